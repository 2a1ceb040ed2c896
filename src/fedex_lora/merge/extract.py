"""A LoRA adapter out of a model that was tuned as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.adapter import Factors, uniform
from fedex_lora.aggregation.seeding import derive
from fedex_lora.disk import new_directory
from fedex_lora.errors import DataError, some
from fedex_lora.merge.checkpoint import Stored, checkpoint
from fedex_lora.model.config import WEIGHTS, published, with_ranks, write_config
from fedex_lora.model.keys import NAMES, PREFIX
from fedex_lora.model.layer import transposed

_OVERSAMPLE, _POWERS = 8, 4  # Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.1 and 4.4
_FIRST = 16  # the rank that `auto` tries first


@dataclass(frozen=True)
class Extracted:
    """What an extraction came to.

    Attributes:
        rank: Of all layers, the largest that one needs.
        error: ‖Δ − written‖_F / ‖Δ‖_F over all tensors of the model, Δ = tuned − base.
        errors: The same by adapted layer.
        whole: Embeddings that were saved as they are.
        left_out: Tensors that changed and are no part of an adapter, with ‖Δ‖_F.
        vocabulary: Rows of the tuned embedding, where the base has others.
    """

    path: Path
    rank: int
    error: float
    errors: Mapping[str, float]
    whole: tuple[str, ...]
    left_out: Mapping[str, float]
    vocabulary: int | None


def best(
    change: Tensor, rank: int | None, error: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Factors of a matrix by a randomised SVD, and ‖change − left·right‖_F.

    Args:
        change: out × in, float32.
        rank: At most this; None for the smallest whose relative error is at most `error`.
        seed: Of the random test matrix.

    Returns:
        left (out × r), right (r × in) and the error, which is measured.

    Example:
        >>> change = torch.outer(torch.arange(3.0), torch.ones(4))
        >>> left, right, missed = best(change, 1)
        >>> bool(torch.allclose(left @ right, change, atol=1e-5)), missed < 1e-5
        (True, True)
    """
    least, size = min(change.shape), change.norm().item()
    wanted = min(least, rank or _FIRST)
    while True:
        u, s, vh = _svd(change, wanted, seed)
        tails = [
            math.sqrt(max(size**2 - kept, 0)) for kept in s.double().square().cumsum(0).tolist()
        ]
        enough = [r for r, tail in enumerate([size, *tails]) if tail <= error * size]
        if rank is not None or enough or wanted == least:
            break
        wanted = min(2 * wanted, least)
    keep = wanted if rank is not None or not enough else max(enough[0], 1)
    left, right = u[:, :keep] * s[:keep], vh[:keep]
    return left, right, (change - left @ right).norm().item()


def _svd(change: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples; by a whole SVD where a random basis saves nothing."""
    width = rank + _OVERSAMPLE
    if 2 * width >= min(change.shape):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(change @ torch.randn(change.shape[1], width, generator=generator)).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ change, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    rank: int | None,
    error: float = 0.0,
    *,
    embeddings: bool = True,
    base_name: str | None = None,
) -> Extracted:
    """Writes a PEFT adapter that makes `tuned` of `base`, as well as its rank can.

    Every Linear and Conv1D layer that changed gets factors; embeddings that changed, the output's
    too, are saved whole, tied ones under both names. One pair of tensors is in memory at a time.

    Args:
        base, tuned: Folders with config.json and safetensors, of one architecture.
        rank: Of all layers; None for the smallest in each whose relative error is at most `error`.
        embeddings: Whether embeddings are saved; else they are left out, and told.
        base_name: What the adapter calls its base.

    Raises:
        UserError: The models differ in more than weights and vocabulary, or not at all; `out` is in
            use or cannot be written.
    """
    (net, config), (_, other) = _net(base), _net(tuned)
    tied = [bool(getattr(one, "tie_word_embeddings", False)) for one in (config, other)]
    if tied[0] != tied[1]:
        raise DataError(
            f"tie_word_embeddings: {tied[0]} in {base}, {tied[1]} in {tuned}; expected models of "
            "one architecture"
        )
    before, after = checkpoint(base), checkpoint(tuned)
    names, factors = _Names(net), {}
    whole: dict[str, Tensor] = {}
    errors, left_out, missed, total, vocabulary = {}, {}, 0.0, 0.0, None
    for key, old, new in _pairs(before, after):
        module = names.module(key)
        kind = names.kinds.get(module)
        if old.shape != new.shape:
            if kind is None or old.shape[1:] != new.shape[1:] or module not in names.vocabulary:
                raise DataError(
                    f"{key}: is {tuple(old.shape)} in {base} and {tuple(new.shape)} in {tuned}; "
                    "expected models of one architecture"
                )
            vocabulary, size = new.shape[0], new.read().float().norm().item()
            change = None
        else:
            change = new.read().float() - old.read().float()
            size = change.norm().item()
            if size == 0:
                continue
        total += size**2
        if module in names.vocabulary and embeddings:
            whole[module] = new.read()
        elif change is None or kind is None or module in names.vocabulary or change.ndim != 2:
            left_out[key] = size
            missed += size**2
        else:
            turned = transposed(kind)
            seed = derive(0, "extract", key)
            left, right, lost = best(change.T if turned else change, rank, error, seed)
            factors[module], errors[module] = Factors(right, left, 1.0), lost / size
            missed += lost**2
    if not factors:
        raise DataError(f"{tuned}: no layer of it differs from {base}; there is nothing to extract")
    factors = uniform({**names.zeros(factors), **factors})
    if whole and tied[0]:
        shared: dict[str, Tensor] = dict.fromkeys(names.vocabulary, next(iter(whole.values())))
        whole = shared
    with new_directory(out, "the adapter", "extract again") as made:
        _write(made, factors, whole, base_name or published(str(base)), net)
    widest = next(iter(factors.values())).rank
    whole_names = tuple(sorted(whole))
    told = (missed / total) ** 0.5
    return Extracted(out, widest, told, errors, whole_names, left_out, vocabulary)


def _net(folder: Path) -> tuple[Any, Any]:
    """The model without numbers: names and kinds of its layers."""
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        made = getattr(transformers, (config.architectures or [""])[0])
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: no model of transformers: {error}") from None
    with torch.device("meta"):
        return made(config), config


class _Names:
    """Which module of a model a tensor on disk belongs to."""

    def __init__(self, net: Any) -> None:
        kinds = (nn.Linear, nn.Embedding, Conv1D)
        self.kinds = {n: m for n, m in net.named_modules() if isinstance(m, kinds)}
        ends = {id(net.get_input_embeddings()), id(net.get_output_embeddings())}
        self.vocabulary = [name for name, m in self.kinds.items() if id(m) in ends]
        self.prefix = net.base_model_prefix

    def module(self, key: str) -> str:
        """The module whose weight the tensor is, or its own name."""
        name = key.removesuffix(".weight") if key.endswith(".weight") else key
        return (
            name
            if name in self.kinds or f"{self.prefix}.{name}" not in self.kinds
            else (f"{self.prefix}.{name}")
        )

    def zeros(self, changed: Mapping[str, Factors]) -> dict[str, Factors]:
        """Factors of nothing for layers called like changed ones: readers adapt all of these."""
        ends = {name.rpartition(".")[2] for name in changed}
        found = {}
        for name, m in self.kinds.items():
            if name.rpartition(".")[2] in ends and name not in self.vocabulary:
                shape = m.weight.shape if not transposed(m) else m.weight.shape[::-1]
                found[name] = Factors(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1), 1.0)
        return found


def _pairs(
    before: Mapping[str, Stored], after: Mapping[str, Stored]
) -> Iterator[tuple[str, Stored, Stored]]:
    """Tensors that both have; a tied output may be on disk in one of them alone."""
    odd = sorted(key for key in before.keys() ^ after.keys() if not key.endswith("lm_head.weight"))
    if odd:
        raise DataError(
            f"the models are of different kinds: only one of them has {some(odd, 3)}; expected one "
            "architecture"
        )
    for key in before.keys() & after.keys():
        yield key, before[key], after[key]


def _write(
    folder: Path, factors: Mapping[str, Factors], whole: Mapping[str, Tensor], base: str, net: Any
) -> None:
    ends = sorted({name.rpartition(".")[2] for name in factors})
    kinds = dict(net.named_modules())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(net, "lm_head") else None,
        "base_model_name_or_path": base,
        "target_modules": ends,
        "modules_to_save": sorted({name.rpartition(".")[2] for name in whole}) or None,
        "fan_in_fan_out": any(transposed(kinds[name]) for name in factors),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    write_config(with_ranks(config, {n: (f.rank, f.scale) for n, f in factors.items()}), folder)
    a, b = NAMES[False]
    tensors = {f"{PREFIX}{name}.weight": tensor.clone() for name, tensor in whole.items()}
    for name, f in factors.items():
        tensors |= {f"{PREFIX}{name}.{a}": f.A, f"{PREFIX}{name}.{b}": f.B}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
