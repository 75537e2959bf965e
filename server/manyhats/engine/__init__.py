"""Request → batch → forward → sample. Knows no gRPC and no Prometheus."""
