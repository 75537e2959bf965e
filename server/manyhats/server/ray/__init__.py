"""Replicas of a server as a deployment of Ray Serve, which opens the ports and chooses the replica of each call."""
