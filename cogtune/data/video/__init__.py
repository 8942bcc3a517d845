"""Clips and still images: reading, measuring and writing them."""
