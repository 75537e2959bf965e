"""What an adapter is: artifact formats, methods, validation and the store. Knows no gRPC and no engine."""
