"""Shapes of the models of the paper, from their public configs; no weights."""
