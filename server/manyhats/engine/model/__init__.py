"""The base model: fetching, quantizing, configuring and running it."""
