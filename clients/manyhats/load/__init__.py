"""Load on a server as its callers make it, and how well they were served: ``manyhats bench``."""
