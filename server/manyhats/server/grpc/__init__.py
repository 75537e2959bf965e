"""The gRPC port: services, messages, statuses."""
