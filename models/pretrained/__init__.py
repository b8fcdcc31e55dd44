"""Weights that ship with the library."""
