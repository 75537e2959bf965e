"""Each row's own adapter on CUDA: memory, records of what acts where, and the launches."""
