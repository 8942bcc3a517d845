"""Checking a dataset: its clips, images and captions."""
