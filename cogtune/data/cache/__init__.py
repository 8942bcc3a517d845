"""The cache of encoded clips and captions, with keys made of their content."""
