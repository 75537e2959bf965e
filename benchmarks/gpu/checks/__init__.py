"""Every kernel against what it computes, in float64 or plain torch; what kernels write holds NaN before."""
