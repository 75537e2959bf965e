"""The process from start to end: settings, wiring, ports, draining."""
