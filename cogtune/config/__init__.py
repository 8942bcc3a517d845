"""What a user asks for: the run's configuration, presets, and which options go together."""
