"""Finding, fetching, reading, quantizing and caching models."""
