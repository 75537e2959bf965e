"""What a streamed token costs the server."""
