"""Runs across machines; the only part that knows Flower. `coordinator` and `progress` do not."""
