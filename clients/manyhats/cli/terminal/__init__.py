"""What every command prints, and how it ends."""
