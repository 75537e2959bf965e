"""Example tasks for the default model: their data, the script that trains them, and the adapters."""
