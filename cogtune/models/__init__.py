"""What is known of the CogVideoX models without loading them: variants, sizes, layers, where they are."""
