"""What each method sends for a model."""
