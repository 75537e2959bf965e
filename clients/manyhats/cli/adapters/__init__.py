"""Commands that manage adapters."""
