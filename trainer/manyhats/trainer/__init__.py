"""The trainer: makes the artifacts that the server serves, with the same method code."""
