"""Federated LoRA with exact aggregation (arXiv 2410.09432)."""

import logging

__version__ = "0.1.0"

# at every import it advises to install kernels for 4-bit products; most models have none
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
