"""Files of a training: written durably, kept in a directory of its own, read as YAML."""
