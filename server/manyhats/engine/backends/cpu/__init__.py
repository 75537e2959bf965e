"""The CPU: kernels compiled by Numba, and linears of NF4, bfloat16 and float32."""
