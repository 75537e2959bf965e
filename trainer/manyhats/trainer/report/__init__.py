"""What a training tells: its events, its progress, its curves, and its report at the end."""
