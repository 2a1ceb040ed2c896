"""Several clients trained in one forward and backward pass: they share the frozen base."""

from fedex_lora.engines.fused.train import Turn, train_fused

__all__ = ["Turn", "train_fused"]
