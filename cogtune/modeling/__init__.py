"""The model side: loading, encoding, conditioning, adapters."""
