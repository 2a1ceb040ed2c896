"""Federated LoRA with exact aggregation (arXiv 2410.09432).

Names are imported when they are first used: `import fedex_lora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedex_lora.errors import (
        DataError,
        DeploymentError,
        MissingDependency,
        ProtocolError,
        QuorumLost,
        RecipeError,
        StorageError,
        UserError,
    )
    from fedex_lora.merge.adapters import open_adapter
    from fedex_lora.merge.plan import make_plan
    from fedex_lora.merge.write import merge_adapters

__version__ = "0.1.0"

_HOMES = {  # where a public name is defined
    "DataError": "errors",
    "DeploymentError": "errors",
    "MissingDependency": "errors",
    "ProtocolError": "errors",
    "QuorumLost": "errors",
    "RecipeError": "errors",
    "StorageError": "errors",
    "UserError": "errors",
    "make_plan": "merge.plan",
    "merge_adapters": "merge.write",
    "open_adapter": "merge.adapters",
}

__all__ = [
    "DataError",
    "DeploymentError",
    "MissingDependency",
    "ProtocolError",
    "QuorumLost",
    "RecipeError",
    "StorageError",
    "UserError",
    "make_plan",
    "merge_adapters",
    "open_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from fedex_lora.errors import EXTRAS, missing  # noqa: PLC0415 (nothing before it is used)

        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise missing(module, f"fedex_lora.{name}") from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
