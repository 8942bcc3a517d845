"""Training itself: objective, loop, optimizer, checkpoints, evaluation, metrics."""
