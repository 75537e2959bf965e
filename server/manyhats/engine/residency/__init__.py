"""Which adapters are in memory, and for whom."""
