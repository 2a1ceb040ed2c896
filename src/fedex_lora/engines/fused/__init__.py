"""Several clients trained in one pass: their factors side by side, one forward and backward."""

from fedex_lora.engines.fused.train import Fused

__all__ = ["Fused"]
