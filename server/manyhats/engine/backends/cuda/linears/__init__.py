"""Products with a model's weights."""
