"""How fast training is, beside others, and the memory it takes."""
