"""Filling the cache: jobs, the processes that do them, and the decoders before the encoders."""
