"""The backend on NVIDIA's GPUs."""
