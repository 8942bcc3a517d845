"""Merging sharded checkpoints into weights that diffusers loads."""

from cogtune.merge.checkpoint import MergeResult, merge_checkpoint

__all__ = ["MergeResult", "merge_checkpoint"]
