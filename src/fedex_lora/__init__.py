"""Federated LoRA with exact aggregation (arXiv 2410.09432).

Names are imported when they are first used: `import fedex_lora` costs nothing. What stands in
`__all__` keeps its meaning until the next major version; everything else may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
    from fedex_lora.aggregation.assignment import Assigned, Assignment
    from fedex_lora.aggregation.methods import Method, register_method
    from fedex_lora.api import Federation, HFTrainer, Model, PrivateTrainer
    from fedex_lora.engines.transforms import chain, clip, gaussian_noise
    from fedex_lora.engines.turn import Trained
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
    from fedex_lora.federation.messages import Broadcast, Update
    from fedex_lora.federation.server import Server
    from fedex_lora.merge.adapters import open_adapter
    from fedex_lora.merge.call import Merge
    from fedex_lora.merge.plan import make_plan
    from fedex_lora.merge.write import merge_adapters
    from fedex_lora.recipe.extensions import register_train, register_transport
    from fedex_lora.runs.by_hand.turning import open_turn
    from fedex_lora.runs.records import Round
    from fedex_lora.tasks import Metric, Task, TaskSpec, register_task

__version__ = "0.1.0"

_HOMES = {  # where a public name is defined
    "AdapterState": "aggregation.adapter",
    "Assigned": "aggregation.assignment",
    "Assignment": "aggregation.assignment",
    "Broadcast": "federation.messages",
    "DataError": "errors",
    "DeploymentError": "errors",
    "Factors": "aggregation.adapter",
    "Federation": "api",
    "HFTrainer": "api",
    "LayerShape": "aggregation.adapter",
    "Merge": "merge.call",
    "Method": "aggregation.methods",
    "Metric": "tasks",
    "MissingDependency": "errors",
    "Model": "api",
    "PrivateTrainer": "api",
    "ProtocolError": "errors",
    "QuorumLost": "errors",
    "RecipeError": "errors",
    "Round": "runs.records",
    "Server": "federation.server",
    "StorageError": "errors",
    "Task": "tasks",
    "TaskSpec": "tasks",
    "Trained": "engines.turn",
    "Update": "federation.messages",
    "UserError": "errors",
    "chain": "engines.transforms",
    "clip": "engines.transforms",
    "gaussian_noise": "engines.transforms",
    "make_plan": "merge.plan",
    "merge_adapters": "merge.write",
    "open_adapter": "merge.adapters",
    "open_turn": "runs.by_hand.turning",
    "register_method": "aggregation.methods",
    "register_task": "tasks",
    "register_train": "recipe.extensions",
    "register_transport": "recipe.extensions",
}

__all__ = [
    "AdapterState",
    "Assigned",
    "Assignment",
    "Broadcast",
    "DataError",
    "DeploymentError",
    "Factors",
    "Federation",
    "HFTrainer",
    "LayerShape",
    "Merge",
    "Method",
    "Metric",
    "MissingDependency",
    "Model",
    "PrivateTrainer",
    "ProtocolError",
    "QuorumLost",
    "RecipeError",
    "Round",
    "Server",
    "StorageError",
    "Task",
    "TaskSpec",
    "Trained",
    "Update",
    "UserError",
    "chain",
    "clip",
    "gaussian_noise",
    "make_plan",
    "merge_adapters",
    "open_adapter",
    "open_turn",
    "register_method",
    "register_task",
    "register_train",
    "register_transport",
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
