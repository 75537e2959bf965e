"""Settings declared once: checked, and read from flags, variables and files, by their declaration."""
