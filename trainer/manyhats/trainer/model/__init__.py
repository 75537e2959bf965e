"""The decoder under autograd: frozen base, adapters as primitives."""
