"""Attention over the paged cache, and how it is divided among threads."""
