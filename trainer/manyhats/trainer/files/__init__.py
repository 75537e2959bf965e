"""Files of a training run: written durably, and kept in an output directory."""
