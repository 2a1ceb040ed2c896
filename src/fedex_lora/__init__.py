"""Federated LoRA with exact aggregation (arXiv 2410.09432).

Names are imported when they are first used: `import fedex_lora` costs nothing. What stands in
`__all__` keeps its meaning until the next major version; everything else may change.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedex_lora.aggregation.adapter import AdapterState, Factors
    from fedex_lora.aggregation.adapter import Site as Layer
    from fedex_lora.aggregation.assignment import Assigned, Assignment
    from fedex_lora.aggregation.methods import Method
    from fedex_lora.api import Federation, HFTrainer, Merge, Model, Round
    from fedex_lora.engines.transforms import chain, clip, gaussian_noise
    from fedex_lora.engines.turn import Trained
    from fedex_lora.errors import QuorumLost, UserError
    from fedex_lora.federation.messages import Broadcast, Update
    from fedex_lora.federation.server import Server

__version__ = "0.1.0"

_HOMES = {  # where a public name is defined
    "AdapterState": "aggregation.adapter",
    "Assigned": "aggregation.assignment",
    "Assignment": "aggregation.assignment",
    "Broadcast": "federation.messages",
    "Factors": "aggregation.adapter",
    "Federation": "api",
    "HFTrainer": "api",
    "Layer": "aggregation.adapter.Site",
    "Merge": "api",
    "Method": "aggregation.methods",
    "Model": "api",
    "QuorumLost": "errors",
    "Round": "api",
    "Server": "federation.server",
    "Trained": "engines.turn",
    "Update": "federation.messages",
    "UserError": "errors",
    "chain": "engines.transforms",
    "clip": "engines.transforms",
    "gaussian_noise": "engines.transforms",
}

__all__ = [
    "AdapterState",
    "Assigned",
    "Assignment",
    "Broadcast",
    "Factors",
    "Federation",
    "HFTrainer",
    "Layer",
    "Merge",
    "Method",
    "Model",
    "QuorumLost",
    "Round",
    "Server",
    "Trained",
    "Update",
    "UserError",
    "chain",
    "clip",
    "gaussian_noise",
]

# at every import it advises to install kernels for 4-bit products; most models have none
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home.endswith(".Site"):
        return import_module(f"{__name__}.aggregation.adapter").Site
    return getattr(import_module(f"{__name__}.{home}"), name)
