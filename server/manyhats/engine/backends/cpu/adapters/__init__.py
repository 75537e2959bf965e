"""Adapters' deltas on the CPU: the tables that say where they are, and the kernels that add them."""
