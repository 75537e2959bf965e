"""Linears with dense weights, whose outputs are the lanes."""
