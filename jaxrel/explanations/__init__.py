"""Explanations: of images, of sentences and of captions word by word, and the result class."""
