"""Where adapters are registered from: directories and URLs."""
