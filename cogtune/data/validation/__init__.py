"""Validation of datasets: their clips, images and captions."""
