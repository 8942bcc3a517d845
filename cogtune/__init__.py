"""cogtune fine-tunes the CogVideoX video models from the command line."""

__version__ = "0.2.0"
