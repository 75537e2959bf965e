"""Settings of a training run, checked when made, and the files they come from."""
