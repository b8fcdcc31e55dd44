"""Recipes: a file per experiment, with its settings, its training and its card."""
