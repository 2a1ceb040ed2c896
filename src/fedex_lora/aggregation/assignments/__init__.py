"""The assignments of the field's methods, each a file. None imports torch before it computes."""
