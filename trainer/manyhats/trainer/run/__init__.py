"""A training run from its first step to its last: steps, evaluations, checkpoints, interrupts."""
