"""``manyhats doctor``: what would keep a server from working."""
