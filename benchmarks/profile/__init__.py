"""Where a step's time goes, beside what the machine could do."""
