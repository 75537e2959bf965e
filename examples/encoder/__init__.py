"""Example tasks for an encoder: texts are read, not continued."""
