"""Facts about the CogVideoX models without loading them: variants, sizes, layers, locations."""
