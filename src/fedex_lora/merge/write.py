"""One PEFT adapter out of several, written layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.disk import new_directory
from fedex_lora.errors import DataError
from fedex_lora.merge.adapters import Place
from fedex_lora.merge.experts import of_parameter
from fedex_lora.merge.factors import Reduced, finite, reduce, rounded, singular_values
from fedex_lora.merge.plan import Plan, within
from fedex_lora.merge.room import check_memory, check_place
from fedex_lora.merge.tensor_file import TensorFile, tensor_file
from fedex_lora.model.config import (
    CONFIG,
    SERVER_LIMITS,
    WEIGHTS,
    above_limits,
    misread,
    with_ranks,
    write_config,
)

REPORT = "merge.json"
_TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# how factors were drawn, what PEFT leaves out of files, and what it does not know (of ms-swift)
_DROPPED = ("eva_config", "corda_config", "lora_ga_config", "velora_config", "loftq_config")
_DROPPED += ("runtime_config", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr")


@dataclass(frozen=True)
class Options:
    """What the merged adapter is to be.

    Attributes:
        rank: The largest rank of a layer; None for what its exact mean has.
        error: How much of a layer's update may be missed, relative in Frobenius norm; the smallest
            rank that keeps to it is taken.
        dtype: Of the stored factors.
        compare: Whether to measure how far averaging the factors would be off.
        tight: Every layer keeps its own rank. If not, all get the largest one, padded with zeros:
            not every program that reads adapters knows ranks by layer.
    """

    rank: int | None = None
    error: float = 0.0
    dtype: torch.dtype = torch.float32
    compare: bool = False
    tight: bool = False


@dataclass(frozen=True)
class Layer:
    """What became of one layer (of all its experts). All but the rank are Frobenius norms.

    Attributes:
        rank: What it needs; of the expert that needs most.
        norm: ‖W‖ of the exact mean update W.
        missed: What cutting to the rank lost.
        rounding: What storing the factors in another dtype lost.
        averaging: ‖W − B̄Ā‖ with B̄ = Σ wᵢsᵢBᵢ, Ā = Σ wᵢAᵢ (zero-padded to the largest rank): what
            averaging the factors would miss. None where it was not asked for, and of a sum.
        at_limit: By rank that servers stop at: what cutting to that would miss.
    """

    rank: int
    norm: float
    missed: float
    rounding: float
    averaging: float | None = None
    at_limit: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """A merged adapter on disk.

    Attributes:
        rank: Of all layers' tensors; None if they have ranks of their own.
    """

    path: Path
    layers: Mapping[str, Layer]
    rank: int | None = None
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    def relative(self, get: Callable[[Layer], float | None]) -> float:
        """√Σ x² / √Σ norm² over all layers for one of their norms x."""
        return share(
            math.hypot(*(get(layer) or 0.0 for layer in self.layers.values())),
            math.hypot(*(layer.norm for layer in self.layers.values())),
        )


def share(part: float, whole: float) -> float:
    """part / whole; 0 for 0 of 0."""
    return part / whole if whole else 0.0


def merge_adapters(plan: Plan, out: Path, options: Options | None = None) -> Merged:
    """Writes the weighted mean (or sum) of the adapters' updates as one PEFT adapter.

    Every layer gets the exact mean at its numerical rank, or its best approximation of
    `options.rank`; every scale is 1. One layer of all adapters is in memory at a time.

    Raises:
        UserError: `out` is in use, lies in an input or cannot be written; too little disk or
            memory; a tensor that is no finite number.
    """
    options = options or Options()
    check_place(out, [adapter.folder for adapter in plan.adapters], _bytes(plan, options))
    check_memory(max(working_bytes(plan, name) for name in plan.layers))
    first = plan.adapters[0]
    task = first.config.get("task_type")
    if task is not None and task not in _TASKS:
        raise DataError(
            f"{first.folder / CONFIG}: PEFT does not take task_type {task!r}; expected one of "
            f"{', '.join(_TASKS)}"
        )
    with new_directory(out, "the merged adapter", "merge again") as new:
        names = [key for name in plan.layers for key in plan.adapters[0].places[name].keys]
        with tensor_file(new / WEIGHTS, [*names, *plan.heads, *plan.copies]) as file:
            layers = {name: _write_layer(plan, name, options, file) for name in plan.layers}
            for key in plan.heads:
                file.add(key, plan.head(key))
            for key in plan.copies:
                file.add(key, plan.copy(key))
        ranks = {name: max(1, layer.rank) for name, layer in layers.items()}
        if not options.tight or any(plan.experts(name) > 1 for name in plan.layers):
            ranks = _pad(plan, new / WEIGHTS, ranks, options.tight)
        write_config(_config(plan, ranks), new)
        _write(new / REPORT, json.dumps(_report(plan, options, layers), indent=1) + "\n")
        _write(new / "README.md", _card(plan))
        misled = [f"`tight`: {who}" for who in misread(new)]
        same = max(ranks.values()) if len(set(ranks.values())) == 1 else None
        merged = Merged(out, layers, same, plan.left_out, misled)
    at = {
        r: merged.relative(lambda layer, r=r: layer.at_limit.get(r, layer.missed))
        for r in SERVER_LIMITS
    }
    return replace(merged, notes=[*above_limits(max(ranks.values()), at), *merged.notes])


def _write_layer(plan: Plan, layer: str, options: Options, file: TensorFile) -> Layer:
    kept, parts = [], []
    averaging = _averaging(plan, layer) if options.compare and not plan.is_sum else None
    for whole in plan.sums(layer):
        found = reduce(whole, options.rank, options.error)
        stored, rounding = rounded(found.factors, options.dtype)
        if not all(map(finite, stored.parts.values())):
            raise DataError(f"{layer}: is too large for {options.dtype}; choose another `dtype`")
        kept.append(stored)
        parts.append(Layer(stored.rank, found.norm, found.missed, rounding, None, _at(found)))
    rank = max(stored.rank for stored in kept)
    _write_factors(plan.adapters[0].places[layer], kept, file)

    def total(get: Callable[[Layer], float]) -> float:
        return math.hypot(*(get(part) for part in parts))

    limits = {r for part in parts for r in part.at_limit}
    return Layer(
        rank,
        total(lambda p: p.norm),
        total(lambda p: p.missed),
        total(lambda p: p.rounding),
        averaging,
        {r: total(lambda p, r=r: p.at_limit.get(r, p.missed)) for r in sorted(limits)},
    )


def _write_factors(place: Place, parts: Sequence[Delta], file: TensorFile) -> None:
    """Of one layer, or of a mixture's experts in PEFT's order; see `Place`."""
    rank = max(1, *(part.rank for part in parts))  # PEFT knows no rank 0
    if len(parts) == 1 and parts[0].rank == rank:
        b, a = parts[0].factors()
    else:
        lefts, rights = zip(*(part.factors() for part in parts))
        a = torch.cat([_longer(right.mT, rank).mT for right in rights])
        b = torch.stack([_longer(left, rank) for left in lefts], dim=-1).flatten(1)
    file.add(place.keys[0], a)
    file.add(place.keys[1], b)


def _longer(w: Tensor, columns: int) -> Tensor:
    """With columns of zeros."""
    return nn.functional.pad(w, (0, columns - w.shape[-1]))


def _at(found: Reduced) -> dict[int, float]:
    """What cutting to the ranks that servers stop at would miss, where that is less than it has."""
    limits = [r for r in SERVER_LIMITS if r < found.factors.rank]
    values = singular_values(found.factors) if limits else torch.empty(0)
    return {r: math.hypot(values[r:].norm().item(), found.missed) for r in limits}


def _pad(plan: Plan, file: Path, ranks: Mapping[str, int], tight: bool) -> dict[str, int]:
    """Gives all layers in the file the largest rank (if tight: those that have experts, whose
    ranks no pattern can name). Returns their ranks."""
    wide = [layer for layer in plan.layers if not tight or plan.experts(layer) > 1]
    rank = max(ranks[layer] for layer in wide)
    if {ranks[layer] for layer in wide} == {rank}:
        return dict(ranks)
    owner = {key: layer for layer in wide for key in plan.adapters[0].places[layer].keys}
    old = file.rename(file.with_suffix(".unpadded"))
    with safe_open(old, framework="pt") as stored, tensor_file(file, stored.keys()) as new:
        for key in stored.keys():  # noqa: SIM118
            tensor = stored.get_tensor(key)
            if key in owner:
                place = plan.adapters[0].places[owner[key]]
                if key == place.keys[0]:
                    blocks = tensor.unflatten(0, (place.experts, -1)).mT
                    tensor = _longer(blocks, rank).mT.flatten(0, 1)
                else:  # a rank's columns of all experts are side by side
                    tensor = _longer(tensor, rank * place.experts)
            new.add(key, tensor)
    old.unlink()
    return {layer: rank if layer in wide else own for layer, own in ranks.items()}


def _averaging(plan: Plan, layer: str) -> float:
    """‖Σ wᵢsᵢBᵢAᵢ − B̄Ā‖_F, as a federated round of factor averaging would leave it."""
    ranks = [adapter.places[layer].shape.rank for adapter in plan.adapters]
    whole = LayerShape(*plan.shape(layer), max(ranks), scale=1.0)
    zero = Factors(torch.zeros(whole.rank, whole.inp), torch.zeros(whole.out, whole.rank), 1.0)
    start = AdapterState({layer: zero})
    aggregators = [
        Aggregator(METHODS["fedit"], {layer: whole}, frozenset("AB"))
        for _ in range(plan.experts(layer))
    ]
    for weight, adapter in zip(plan.weights, plan.adapters):
        for aggregator, (a, b, scale) in zip(aggregators, adapter.terms(layer)):
            if weight:
                end = Factors(a.float(), b.float(), scale)
                aggregator.add(weight, start, AdapterState({layer: end}))
    return math.hypot(*(a.finish().deviation[layer] for a in aggregators))


def _config(plan: Plan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The first adapter's, with the merged ranks and a scale of 1 everywhere.

    How factors are drawn at first goes: PEFT draws them before it loads these, and not at any rank.
    """
    first = plan.adapters[0]
    config = {key: value for key, value in first.config.items() if key not in _DROPPED}
    config["init_lora_weights"] = True
    tied = config.get("ensure_weight_tying") and any(p.embedding for p in first.places.values())
    if tied:
        config["ensure_weight_tying"] = False  # two layers' factors are no longer each other's
    if tied or set(plan.layers) != set(first.places):
        whole = [layer for layer in plan.layers if not of_parameter(first.config, layer)]
        config |= {"target_modules": whole, "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    if set(plan.heads) != {key for key in first.others if key not in plan.copies}:
        config["modules_to_save"] = _still_saved(config.get("modules_to_save"), plan.heads)
        config["task_type"] = None  # PEFT adds a head to some task types
    like = next((layer for layer in ranks if plan.experts(layer) > 1), None)
    return with_ranks(config, {layer: (rank, 1.0) for layer, rank in ranks.items()}, like)


def _still_saved(modules: Any, heads: Sequence[str]) -> list[str] | None:
    kept = [m for m in modules or [] if any(within(key, [m]) for key in heads)]
    return kept or None


def _report(plan: Plan, options: Options, layers: Mapping[str, Layer]) -> dict[str, Any]:
    return {
        "adapters": [adapter.name for adapter in plan.adapters],
        "weights": list(plan.weights),
        "sum": plan.is_sum,
        "rank": options.rank,
        "error": options.error,
        "dtype": str(options.dtype).removeprefix("torch."),
        "left_out": list(plan.left_out),
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


def _card(plan: Plan) -> str:
    base = plan.adapters[0].config.get("base_model_name_or_path")
    rows = [f"| {a.name} | {w:.6g} |" for a, w in zip(plan.adapters, plan.weights)]
    left_out = [f"- {line}" for line in plan.left_out]
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base)}",
            "library_name: peft",
            "tags: [lora, merge]",
            "---",
            "",
            f"The weighted {'sum' if plan.is_sum else 'mean'} of the updates of these adapters, "
            "made by `fedex-lora merge`.",
            f"Ranks and errors by layer are in {REPORT}.",
            "",
            "| adapter | weight |",
            "|---|---|",
            *rows,
            *(
                ["", "Passed over (what not all have is left out):", "", *left_out]
                if left_out
                else []
            ),
            "",
        ]
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _bytes(plan: Plan, options: Options) -> int:
    """The most that the output can take, and while it is padded what it takes besides."""
    size = torch.finfo(options.dtype).bits // 8
    ranks, sides = {}, {}
    for layer in plan.layers:
        shape = plan.shape(layer)
        ranks[layer] = min(plan.rank(layer), *shape, options.rank or min(shape))
        sides[layer] = sum(shape) * plan.experts(layer) * size
    total = sum(ranks[layer] * sides[layer] for layer in plan.layers)
    if not options.tight and len(set(ranks.values())) > 1:
        total += max(ranks.values()) * sum(sides.values())
    return total + sum(
        4 * torch.Size(plan.saved_shape(key)).numel() for key in [*plan.heads, *plan.copies]
    )


def working_bytes(plan: Plan, layer: str) -> int:
    """What one layer takes while it is merged: its factors, or a few dense float64 matrices: the
    sum, the Gram matrix of its shorter side, and what that one's eigenvectors take. Of experts the
    factors of all."""
    shape, rank, experts = plan.shape(layer), plan.rank(layer), plan.experts(layer)
    factors = 4 * rank * sum(shape) * 3
    kept = 0 if experts == 1 else experts * factors
    if rank >= min(shape):
        return kept + 8 * (shape[0] * shape[1] + 6 * min(shape) ** 2)
    return kept + factors + 8 * 8 * rank**2
