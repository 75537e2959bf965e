"""Models on disk and on their way there: found, fetched, read, quantized, cached."""
