"""A run on disk: its plan, the files that launch it, its checkpoints and metrics."""
