"""Kernels in Triton, and nothing else: what launches them is in the folder above."""
