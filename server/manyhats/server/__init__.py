"""gRPC services, metrics, health, configuration and process life."""
