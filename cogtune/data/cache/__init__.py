"""Encoded clips and captions on disk, by keys of their content."""
