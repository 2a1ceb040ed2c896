"""Adapters of a mixture's experts, which PEFT keeps in one pair of factors for all of them.

With `target_parameters` PEFT adapts a parameter (experts × …) by A (experts·r × in), expert after
expert, and B (out × r·experts), whose columns go to the experts in turn. Of two parameters of one
module the second is called as the module is, the first has `.base_layer` in its name; which
parameter that is stands nowhere, and need not be known as long as ranks and scales do not differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from fedex_lora.errors import DataError
from fedex_lora.model.config import CONFIG
from fedex_lora.model.plain import configured


class Form(NamedTuple):
    """A layer's rank and scale, and how many matrices its factors are of."""

    rank: int
    scale: float
    experts: int


def module_of(layer: str) -> str:
    """The module whose parameter is adapted.

    Example:
        >>> module_of("model.layers.0.mlp.experts.base_layer")
        'model.layers.0.mlp.experts'
    """
    return layer.replace(".base_layer", "")


def targeted(config: Mapping[str, Any], module: str) -> list[str]:
    """Names of a module's parameters that `target_parameters` may mean.

    Example:
        >>> targeted({"target_parameters": ["experts.up", "experts.down", "gate.w"]}, "0.experts")
        ['down', 'up']
    """
    found = set()
    for target in config.get("target_parameters") or []:
        within, _, parameter = target.rpartition(".")
        if not within or f".{module}".endswith(f".{within}"):
            found.add(parameter)
    return sorted(found)


def of_parameter(config: Mapping[str, Any], layer: str) -> bool:
    """Whether a layer's factors may be those of a parameter that is targeted by its name."""
    return bool(targeted(config, module_of(layer)))


def forms(name: str, config: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Form]:
    """Ranks and scales of all layers by their configuration.

    Args:
        name: The adapter, for errors.
        rows: Of A, by layer.

    Raises:
        UserError: They do not fit.
    """
    families: dict[str, list[str]] = {}
    for layer in rows:
        families.setdefault(module_of(layer), []).append(layer)
    found: dict[str, Form] = {}
    for module, layers in families.items():
        layers.sort(key=len)  # the last parameter that was wrapped comes first
        options = {tuple(o) for o in _options(config, module, layers, [rows[s] for s in layers])}
        if not options:
            layer = layers[0]
            rank = configured(config, layer, 1)[0]
            raise DataError(
                f"{name}: {layer} has rank {rows[layer]} in the file and {rank} in {CONFIG}: these "
                "are not of one adapter, or r or rank_pattern was changed by hand; expected what "
                "it was trained with, from which its scale follows"
            )
        if len(options) > 1:
            raise DataError(
                f"{name}: which parameter of {module} has which rank and alpha cannot be told; "
                f"expected one rank_pattern and alpha_pattern for all of them in {CONFIG}"
            )
        found |= dict(zip(layers, options.pop()))
    return found


def _options(
    config: Mapping[str, Any], module: str, layers: Sequence[str], rows: Sequence[int]
) -> Iterator[list[Form]]:
    """What the layers of one module may be: a plain one, or its parameters in some order."""
    rank, scale = configured(config, layers[0], rows[0])
    if len(layers) == 1 and rank == rows[0] and module == layers[0]:
        yield [Form(rank, float(scale), 1)]
        return
    for order in permutations(targeted(config, module), len(layers)):
        own = []
        for parameter, height in zip(order, rows):
            rank = configured(config, f"{module}.{parameter}", 1)[0]
            scale = configured(config, f"{module}.{parameter}", rank)[1]
            own.append(Form(rank, float(scale), height // rank))
        whole = all(f.rank > 0 and f.rank * f.experts == height for f, height in zip(own, rows))
        if whole and len({f.experts for f in own}) == 1:
            yield own
