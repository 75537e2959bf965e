"""What would keep a server with given settings from starting, or from being fast, and what to do about it."""
