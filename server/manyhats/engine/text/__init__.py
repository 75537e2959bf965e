"""Text and tokens: tokenizers, chat templates, and what ends an answer."""
