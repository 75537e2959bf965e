"""The output head: logits in eight bits, and exact ones of the tokens that matter."""
