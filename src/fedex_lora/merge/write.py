"""One PEFT adapter out of several, written layer by layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from fedex_lora.adapter import AdapterState, Factors, Site
from fedex_lora.aggregate import Aggregator
from fedex_lora.disk import new_directory
from fedex_lora.errors import UserError
from fedex_lora.merge.factors import finite, reduce, rounded
from fedex_lora.merge.plan import Plan
from fedex_lora.merge.room import check_memory, check_place
from fedex_lora.merge.tensor_file import TensorFile, tensor_file
from fedex_lora.methods import METHODS
from fedex_lora.model.files import CONFIG, WEIGHTS, with_ranks
from fedex_lora.model.load import quiet

REPORT = "merge.json"


@dataclass(frozen=True)
class Options:
    """What the merged adapter is to be.

    Attributes:
        rank: The largest rank of a layer; None for what its exact mean has.
        error: How much of a layer's update may be missed, relative in Frobenius norm; the smallest
            rank that keeps to it is taken.
        dtype: Of the stored factors.
        compare: Whether to measure how far averaging the factors would be off.
    """

    rank: int | None = None
    error: float = 0.0
    dtype: torch.dtype = torch.float32
    compare: bool = False


@dataclass(frozen=True)
class Layer:
    """What became of one layer. All but the rank are Frobenius norms.

    Attributes:
        rank: Of the stored factors.
        norm: ‖W‖ of the exact mean update W.
        missed: What cutting to the rank lost.
        rounding: What storing the factors in another dtype lost.
        averaging: ‖W − B̄Ā‖ with B̄ = Σ wᵢsᵢBᵢ, Ā = Σ wᵢAᵢ (zero-padded to the largest rank): what
            averaging the factors would miss. None where it was not asked for.
    """

    rank: int
    norm: float
    missed: float
    rounding: float
    averaging: float | None = None


@dataclass(frozen=True)
class Merged:
    """A merged adapter on disk."""

    path: Path
    layers: Mapping[str, Layer]
    left_out: Sequence[str] = ()

    def relative(self, get: Callable[[Layer], float | None]) -> float:
        """√Σ x² / √Σ norm² over all layers for one of their norms x."""
        return share(
            sum((get(layer) or 0.0) ** 2 for layer in self.layers.values()) ** 0.5,
            sum(layer.norm**2 for layer in self.layers.values()) ** 0.5,
        )


def share(part: float, whole: float) -> float:
    """part / whole; 0 for 0 of 0."""
    return part / whole if whole else 0.0


def merge_adapters(plan: Plan, out: Path, options: Options | None = None) -> Merged:
    """Writes the weighted mean of the adapters' updates as one PEFT adapter.

    Every layer gets the exact mean at its numerical rank, or its best approximation of
    `options.rank`; every scale is 1. One layer of all adapters is in memory at a time.

    Raises:
        UserError: `out` is in use, lies in an input or cannot be written; too little disk or
            memory; a tensor that is no finite number.
    """
    options = options or Options()
    check_place(out, [adapter.folder for adapter in plan.adapters], _bytes(plan, options))
    check_memory(max(working_bytes(plan, site) for site in plan.sites))
    config = _first_config(plan)
    with new_directory(out, "the merged adapter", "merge again") as new:
        names = [key for site in plan.sites for key in plan.adapters[0].places[site].keys]
        with tensor_file(new / WEIGHTS, [*names, *plan.heads, *plan.copies]) as file:
            layers = {site: _write_site(plan, site, options, file) for site in plan.sites}
            for key in plan.heads:
                file.add(key, plan.head(key))
            for key in plan.copies:
                file.add(key, plan.copy(key))
        _config(plan, config, layers).save_pretrained(str(new))
        _write(new / REPORT, json.dumps(_report(plan, options, layers), indent=1) + "\n")
        _write(new / "README.md", _card(plan))
    return Merged(out, layers, plan.left_out)


def _write_site(plan: Plan, site: str, options: Options, file: TensorFile) -> Layer:
    found = reduce(plan.sum(site), options.rank, options.error)
    stored, rounding = rounded(found.factors, options.dtype)
    key_a, key_b = plan.adapters[0].places[site].keys
    for key, factor in ((key_a, stored.right), (key_b, stored.left)):
        if not finite(factor):
            raise UserError(f"{site}: is too large for {options.dtype}; choose another --dtype")
        file.add(key, _at_least_rank_1(factor, 0 if key == key_a else 1))
    averaging = _averaging(plan, site) if options.compare else None
    return Layer(stored.rank, found.norm, found.missed, rounding, averaging)


def _at_least_rank_1(factor: Tensor, dim: int) -> Tensor:
    """PEFT knows no rank 0: such a layer gets factors of zeros."""
    if factor.shape[dim]:
        return factor
    shape = [1 if i == dim else size for i, size in enumerate(factor.shape)]
    return factor.new_zeros(shape)


def _averaging(plan: Plan, site: str) -> float:
    """‖Σ wᵢsᵢBᵢAᵢ − B̄Ā‖_F, as a federated round of factor averaging would leave it."""
    ranks = [adapter.places[site].site.rank for adapter in plan.adapters]
    whole = Site(*plan.shape(site), max(ranks), scale=1.0)
    aggregator = Aggregator(METHODS["fedit"], {site: whole}, frozenset("AB"))
    zero = Factors(torch.zeros(whole.rank, whole.inp), torch.zeros(whole.out, whole.rank), 1.0)
    start = AdapterState({site: zero})
    for weight, (a, b, scale) in zip(plan.weights, plan.terms(site)):
        if weight:
            end = Factors(a.float(), b.float(), scale)
            aggregator.add(weight, start, AdapterState({site: end}))
    return aggregator.finish().deviation[site]


def _first_config(plan: Plan) -> LoraConfig:
    """The first adapter's.

    Raises:
        UserError: PEFT does not take it.
    """
    folder = plan.adapters[0].folder
    try:
        with quiet():
            config: Any = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: PEFT does not take it: {error}") from None
    return config


def _config(plan: Plan, config: Any, layers: Mapping[str, Layer]) -> LoraConfig:
    """The first adapter's, with the merged ranks and a scale of 1 everywhere."""
    first = plan.adapters[0]
    ranks = {site: max(1, layer.rank) for site, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = replace(config, r=rank, lora_alpha=rank, use_rslora=False)
    if set(plan.sites) != set(first.places):
        config.target_modules, config.exclude_modules = list(plan.sites), None
        config.layers_to_transform = config.layers_pattern = None
    if set(plan.heads) != {key for key in first.others if key not in plan.copies}:
        config.modules_to_save = _still_saved(config.modules_to_save, plan.heads)
        config.task_type = None  # PEFT adds a head to some task types
    return with_ranks(config, {site: (rank, 1.0) for site, rank in ranks.items()})


def _still_saved(modules: Any, heads: Sequence[str]) -> list[str] | None:
    kept = [m for m in modules or [] if any(f".{m}." in f".{key}" for key in heads)]
    return kept or None


def _report(plan: Plan, options: Options, layers: Mapping[str, Layer]) -> dict[str, Any]:
    return {
        "adapters": [adapter.name for adapter in plan.adapters],
        "weights": list(plan.weights),
        "rank": options.rank,
        "error": options.error,
        "dtype": str(options.dtype).removeprefix("torch."),
        "left_out": list(plan.left_out),
        "layers": {site: asdict(layer) for site, layer in layers.items()},
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
            "The weighted mean of the updates of these adapters, made by `fedex-lora merge`.",
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
    """The most that the output can take."""
    size = torch.finfo(options.dtype).bits // 8
    total = 0
    for site in plan.sites:
        shape = plan.shape(site)
        total += min(plan.rank(site), *shape, options.rank or min(shape)) * sum(shape) * size
    first = plan.adapters[0].others
    return total + sum(4 * torch.Size(first[key]).numel() for key in [*plan.heads, *plan.copies])


def working_bytes(plan: Plan, site: str) -> int:
    """What one layer takes while it is merged: its factors, or a few dense float64 matrices: the
    sum, the Gram matrix of its shorter side, and what that one's eigenvectors take."""
    shape, rank = plan.shape(site), plan.rank(site)
    if rank >= min(shape):
        return 8 * (shape[0] * shape[1] + 6 * min(shape) ** 2)
    return 4 * 3 * rank * sum(shape) + 8 * 8 * rank**2
