"""NF4 linears in 16-bit integers."""
