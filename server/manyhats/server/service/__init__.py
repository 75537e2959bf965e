"""What the server does for its callers, whatever the transport."""
