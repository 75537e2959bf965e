"""What can be trained: one file per method, and what they share."""
