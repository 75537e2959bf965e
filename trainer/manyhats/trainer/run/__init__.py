"""A training from its first step to its last: steps, evaluations, checkpoints, interrupts."""
