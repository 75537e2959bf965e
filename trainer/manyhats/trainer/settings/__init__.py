"""What a training is told: settings, checked when made, and the files that hold them."""
