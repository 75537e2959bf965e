"""From an artifact to primitives: read, checked against a base, lowered, composed."""
