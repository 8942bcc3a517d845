"""Datasets, from a folder of clips and captions to training batches: samples, findings, frames, cache."""
