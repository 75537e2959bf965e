"""Adapters as AdapterHub saves them."""
