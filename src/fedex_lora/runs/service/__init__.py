"""What a finished model is used for: answers, and places where others find it."""
