"""The synthetic world of the nano models, and the detector that evaluates it."""
