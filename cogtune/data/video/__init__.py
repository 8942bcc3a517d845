"""Video and image files: reading, probing and writing them."""
