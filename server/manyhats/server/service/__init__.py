"""What the server does for its callers, whatever they call it through."""
