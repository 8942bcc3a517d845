"""What a run will take, whether it fits, and what was measured."""
