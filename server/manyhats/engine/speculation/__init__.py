"""Guessing an answer's next tokens, so that several are computed in one step."""
