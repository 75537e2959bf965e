"""Training data: read from files, tokenized as the server does, and batched."""
