"""The forms in which a dataset can be laid out on disk."""
