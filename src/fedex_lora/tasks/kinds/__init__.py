"""The tasks, a file each: `token_classification.py` is the kind `token-classification`.

A file defines the kind's block of a recipe and builds its `Task`; it is imported when a recipe
asks for the kind, and loads the large libraries when they are used.
"""
