"""From logits on the device to tokens and log-probabilities."""
