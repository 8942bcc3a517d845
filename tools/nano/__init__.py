"""The scripts that make nano: a CogVideoX of a few megabytes, trained on a small world of its own."""
