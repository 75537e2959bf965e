"""What a decoder is: its shape, its families, its weights and their 4-bit form."""
