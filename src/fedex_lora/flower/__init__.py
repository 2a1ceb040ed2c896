"""Runs across machines, and a strategy for other Flower apps; the only part that knows Flower.

Nothing is imported before it is asked for: neither torch nor flwr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedex_lora.flower.client import load_global, save_global
    from fedex_lora.flower.strategy import FedExLora

__all__ = ["FedExLora", "load_global", "save_global"]

_WHERE = {"FedExLora": "strategy", "load_global": "client", "save_global": "client"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise ImportError(
            f"{__name__}.{name} needs Flower: pip install 'fedex-lora[flower]'"
        ) from error
