"""What a training run reports: events, progress, curves, and a report at the end."""
