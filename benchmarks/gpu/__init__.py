"""What a GPU makes of the engine: kernels, bits and speed, beside peers and goals, within some minutes."""
