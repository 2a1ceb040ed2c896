"""Federated LoRA with exact aggregation (arXiv 2410.09432)."""

__version__ = "0.1.0"
