"""``cogtune bench``: a preset's real training step on random weights of the real size, measured."""
