"""The world of the nano models, and the detector that reads it."""
