"""Data sets, recipes and evaluation runs."""
