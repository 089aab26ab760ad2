"""Fused layers: one file for each kind of stock layer that an operator computes, and the registry that lists them."""
