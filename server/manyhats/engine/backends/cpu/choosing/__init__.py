"""Tokens chosen and log-probabilities taken on the CPU."""
