"""Attention over paged keys and values, and the way into the cache."""
