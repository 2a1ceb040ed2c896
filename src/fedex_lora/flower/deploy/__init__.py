"""What a federation across machines needs on disk, and the Flower commands that run it."""
