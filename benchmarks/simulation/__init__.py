"""The scheduler and adapters' residency as they serve, on a clock and a machine that are simulated."""
