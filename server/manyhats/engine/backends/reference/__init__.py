"""The same in plain torch, slow and obvious: the oracle of the kernels."""
