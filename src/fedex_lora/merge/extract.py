"""A LoRA adapter out of a model that was tuned as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.adapter import Factors, uniform
from fedex_lora.aggregation.seeding import derive
from fedex_lora.disk import check_free, new_directory
from fedex_lora.errors import DataError, some
from fedex_lora.merge.checkpoint import checkpoint
from fedex_lora.merge.factors import finite
from fedex_lora.merge.opening import AUTO, build, read_config
from fedex_lora.merge.target import Target, vocabulary
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
        error: ‖Δ − written‖_F / ‖Δ‖_F over all parameters that both have, Δ = tuned − base.
        errors: The same by adapted layer.
        whole: Modules that were saved as they are: embeddings, heads, what the base has none of.
        left_out: Parameters that changed and are no part of an adapter, with ‖Δ‖_F.
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

    Both are seen as the class of `tuned`, whatever their files call its parameters. Every Linear
    and Conv1D layer that changed gets factors, and so do a mixture's stacked experts. Embeddings
    and heads that changed, and modules that `base` has none of, are saved whole, tied embeddings
    under both names. One pair of tensors is in memory at a time.

    Args:
        base, tuned: Folders with config.json and safetensors, of one architecture.
        rank: Of all layers; None for the smallest in each whose relative error is at most `error`.
        embeddings: Whether embeddings are saved; else they are left out, and told.
        base_name: What the adapter calls its base.

    Raises:
        UserError: The models differ in more than weights, heads and vocabulary, or not at all, or
            hold NaN or infinity; `out` is in use or cannot be written.
    """
    check_free(out)
    before, after = _models(base, tuned)
    modules = _Modules(before, after)
    factors: dict[tuple[str, int], Factors] = {}  # by parameter and expert
    saved, errors, left_out = set[str](), {}, {}
    missed, total, tokens = 0.0, 0.0, None
    for name, _ in after.net.named_parameters():
        old, new = before.value(name), after.value(name)
        whole = modules.whole(name)
        if old is None and new is None:
            continue  # computed, and not kept on disk
        for folder, tensor in ((base, old), (tuned, new)):
            if tensor is not None and not finite(tensor):
                raise DataError(f"{folder}: {name} holds NaN or infinity; its training went wrong")
        if new is None:
            raise DataError(f"{tuned}: its files hold nothing for {name}; it is not complete")
        if old is None:
            saved.add(whole or name.rpartition(".")[0])
            continue
        if old.shape == new.shape:
            change = new.float() - old.float()
        elif whole and old.shape[1:] == new.shape[1:]:
            change = new.float()
            tokens = len(new) if whole in modules.embeddings else tokens
        else:
            raise DataError(
                f"{name}: is {tuple(old.shape)} in {base} and {tuple(new.shape)} in {tuned}; "
                "expected models of one architecture"
            )
        size = change.norm().item()
        if size == 0:
            continue
        total += size**2
        if whole and (embeddings or whole not in modules.embeddings):
            saved.add(whole)
        elif name not in modules.adapted:
            left_out[name] = size
            missed += size**2
        else:
            lost = 0.0
            for i, matrix in enumerate(modules.matrices(name, change)):
                left, right, off = best(matrix, rank, error, derive(0, "extract", name))
                factors[name, i] = Factors(right, left, 1.0)
                lost = math.hypot(lost, off)
            errors[name.removesuffix(".weight")] = lost / size
            missed += lost**2
    if not factors:
        raise DataError(f"{tuned}: no layer of it differs from {base}; there is nothing to extract")
    factors = uniform({**modules.zeros(factors), **factors})
    saved |= {other for one in saved for other in modules.tied(one)}
    widest = next(iter(factors.values())).rank
    with new_directory(out, "the adapter", "extract again") as made:
        _write(
            made,
            _by_layer(after, factors),
            widest,
            sorted(saved),
            base_name or published(str(base)),
            after,
        )
    told = (missed / total) ** 0.5
    return Extracted(out, widest, told, errors, tuple(sorted(saved)), left_out, tokens)


def _models(base: Path, tuned: Path) -> tuple[Target, Target]:
    """Both as the class of `tuned`, without numbers."""
    configs = [read_config(folder) for folder in (base, tuned)]
    kind = (configs[1].architectures or ["AutoModel"])[0]
    if type(configs[0]) is not type(configs[1]):
        kinds = [config.model_type for config in configs]
        raise DataError(
            f"the models are of different kinds: {base} is a {kinds[0]}, {tuned} a {kinds[1]}; "
            "expected one architecture"
        )
    before, after = (
        Target(folder, config, kind, build(folder, kind, config), checkpoint(folder, config.dtype))
        for folder, config in zip((base, tuned), configs)
    )
    names = [{name for name, _ in model.net.named_parameters()} for model in (before, after)]
    ends = [f"{name}.weight" for name in vocabulary(after.net)]
    if [before.tied(end) for end in ends] != [after.tied(end) for end in ends]:
        tied = [config.get_text_config().tie_word_embeddings for config in configs]
        raise DataError(
            f"tie_word_embeddings: {tied[0]} in {base}, {tied[1]} in {tuned}; expected models of "
            "one architecture"
        )
    odd = sorted(names[0] ^ names[1])
    if odd:
        raise DataError(
            f"the models are of different kinds: only one of them has {some(odd, 3)}; expected one "
            "architecture"
        )
    return before, after


class _Modules:
    """What becomes of a model's modules if they changed.

    Attributes:
        adapted: Parameters that get factors, by name: weights of Linear and Conv1D layers, but the
            output's embedding, and a mixture's stacked experts.
        embeddings: Names of all embeddings.
    """

    def __init__(self, before: Target, after: Target) -> None:
        self._after, net = after, after.net
        kinds = dict(net.named_modules(remove_duplicate=False))
        self.embeddings = {n for n, m in kinds.items() if isinstance(m, nn.Embedding)}
        self.embeddings |= {*vocabulary(net)}
        # beside the backbone, and not the output's embedding
        heads = [] if net.base_model is net else [n for n, _ in net.named_children()]
        heads = [h for h in heads if not any(f"{e}.".startswith(f"{h}.") for e in self.embeddings)]
        held = [name for name, _ in net.named_parameters() if before.holds(name)]
        new = [_highest(n, held) for n, _ in net.named_parameters() if n not in held]
        self._whole = {*heads, *new, *self.embeddings}
        self._owners = kinds
        self.adapted = {
            name: p
            for name, p in net.named_parameters()
            if self.whole(name) is None and self._has_factors(name, p)
        }

    def _has_factors(self, name: str, parameter: Tensor) -> bool:
        module, _, leaf = name.rpartition(".")
        if parameter.ndim == 3:
            return "experts" in module.rpartition(".")[2]
        return isinstance(self._owners[module], nn.Linear | Conv1D) and leaf == "weight"

    def matrices(self, name: str, value: Tensor) -> list[Tensor]:
        """A parameter that gets factors, or its change, as matrices out × in: one an expert."""
        owner = self._owners[name.rpartition(".")[0]]
        turned = transposed(owner) or bool(getattr(owner, "is_transposed", False))
        parts = value.unbind() if value.ndim == 3 else [value]
        return [part.T if turned else part for part in parts]

    def whole(self, name: str) -> str | None:
        """The module that is saved as it is if the parameter changed; None for a layer's."""
        around = (m for m in self._whole if name.startswith(f"{m}."))
        return min(around, key=len, default=None)

    def tied(self, module: str) -> set[str]:
        """Modules that share their weight with that one, and itself."""
        return {name.removesuffix(".weight") for name in self._after.tied(f"{module}.weight")}

    def zeros(self, changed: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Factors]:
        """Factors of nothing for layers called like changed ones: readers adapt all of these."""
        ends = {_end(name) for name, _ in changed}
        return {
            (name, i): Factors(torch.zeros(1, part.shape[1]), torch.zeros(part.shape[0], 1), 1.0)
            for name, parameter in self.adapted.items()
            if _end(name) in ends
            for i, part in enumerate(self.matrices(name, parameter))
        }


def _end(name: str) -> str:
    """A layer's own name, and a parameter's with that of its module."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" else ".".join(parts[-2:])


def _by_layer(
    model: Target, factors: Mapping[tuple[str, int], Factors]
) -> dict[str, tuple[str, Factors]]:
    """By PEFT's name of a layer: what it is targeted by, and its factors (see `merge.experts`)."""
    parts: dict[str, list[Factors]] = {}
    for (name, _), one in factors.items():
        parts.setdefault(name, []).append(one)
    found = {}
    for name, own in parts.items():
        module, _, leaf = name.rpartition(".")
        layer = module
        if len(own) > 1:
            leaves = [n for n, _ in model.net.get_submodule(module).named_parameters(recurse=False)]
            after = [n for n in leaves[leaves.index(leaf) + 1 :] if f"{module}.{n}" in parts]
            layer += ".base_layer" * len(after)
        a = torch.cat([f.A for f in own])
        b = torch.stack([f.B for f in own], dim=-1).flatten(1)
        found[layer] = (_end(name), Factors(a, b, 1.0))
    return found


def _highest(name: str, held: Sequence[str]) -> str:
    """The highest module around a parameter within which none of `held` is."""
    module, above = name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]
    while above and not any(one.startswith(f"{above}.") for one in held):
        module, above = above, above.rpartition(".")[0]
    return module


def _write(
    folder: Path,
    layers: Mapping[str, tuple[str, Factors]],
    rank: int,
    saved: Sequence[str],
    base: str,
    model: Target,
) -> None:
    targets = {end for end, _ in layers.values()}
    modules = [m for n, m in model.net.named_modules() if n in layers]
    config = {
        "peft_type": "LORA",
        "task_type": _task(model, saved),
        "base_model_name_or_path": base,
        "target_modules": sorted(end for end in targets if "." not in end),
        "target_parameters": sorted(end for end in targets if "." in end) or None,
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": any(map(transposed, modules)),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    write_config(with_ranks(config, dict.fromkeys(layers, (rank, 1.0))), folder)
    a, b = NAMES[False]
    tensors: dict[str, Tensor] = {}
    for name, (_, f) in layers.items():
        tensors |= {f"{PREFIX}{name}.{a}": f.A, f"{PREFIX}{name}.{b}": f.B}
    for name, _ in model.net.named_parameters(remove_duplicate=False):
        if any(name.startswith(f"{module}.") for module in saved):
            value = model.value(name)
            assert value is not None
            tensors[PREFIX + name] = value
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def _task(model: Target, saved: Sequence[str]) -> str | None:
    """What PEFT calls the use of the model; None where it would expect a head that is not saved."""
    for task, auto in AUTO.items():
        if getattr(transformers, auto)._model_mapping.get(type(model.config), None) is type(
            model.net
        ):
            heads = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
            return (
                None if heads and not set(saved) & {"classifier", "score", "qa_outputs"} else task
            )
    return None
