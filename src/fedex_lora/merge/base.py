"""The weighted mean of adapters' updates added to a full model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedex_lora.disk import new_directory
from fedex_lora.errors import UserError
from fedex_lora.lowrank import LowRank
from fedex_lora.merge.factors import Reduced, finite, reduce
from fedex_lora.merge.plan import Plan
from fedex_lora.merge.room import check_memory, check_place
from fedex_lora.merge.target import INDEX, Target, open_target
from fedex_lora.merge.tensor_file import TensorFile, tensor_file
from fedex_lora.merge.write import working_bytes
from fedex_lora.model.files import PREFIX

# weights in other forms, and what is written anew
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}
_ROWS = 1024  # of a weight whose rounding is measured at a time


@dataclass(frozen=True)
class Written:
    """A full model with the merged update in it.

    Attributes:
        auto_model: The class in transformers to load it with.
        layers: How many layers were changed.
        missed: What a cut to a rank lost of the update: relative, in Frobenius norm.
        rounding: ‖cast(W) − W‖_F / ‖W‖_F over the changed weights W = W₀ + Σ wᵢsᵢBᵢAᵢ.
        notes: What the user should know.
    """

    auto_model: str
    layers: int
    missed: float
    rounding: float
    notes: Sequence[str]


def merge_into_base(
    plan: Plan,
    model: str,
    out: Path,
    rank: int | None = None,
    error: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Written:
    """Writes `model` with the weighted mean of the adapters' updates in its weights.

    The sum is taken in float32 (float64 for a float64 model) and rounded once. Shards keep their
    names; one tensor is in memory at a time. A weight that was tied to another one and is changed
    gets its own tensor, and `tie_word_embeddings` becomes false.

    Args:
        model: A folder or hub id.
        rank: The largest rank of a layer's update; `error`: see `merge.write.Options`.
        dtype: Of all floating tensors; by default that of each in `model`.

    Raises:
        UserError: The adapters do not fit the model; `out` is in use, lies in an input or cannot
            be written; too little disk or memory.
    """
    others = {_parameter(key): key for key in [*plan.heads, *plan.copies]}
    shapes = {n: plan.adapters[0].others[key] for n, key in others.items()}
    target = open_target(model, plan.adapters[0].config, shapes)
    for site in plan.sites:
        target.check_site(site, plan.adapters[0].places[site])
    untied = _untied(target, {*others, *(f"{site}.weight" for site in plan.sites)})
    work = _Work(plan, target, others, rank, error, dtype)
    extra = [name for name in sorted({*others, *untied}) if name not in target.stored]
    inputs = [target.folder, *(adapter.folder for adapter in plan.adapters)]
    check_place(out, inputs, work.size([*target.stored, *extra]))
    check_memory(work.largest())
    with new_directory(out, "the merged model", "merge again") as new:
        _copy_files(target, new)
        _write_shards(work, new, extra)
        known = type(target.net).__name__ in (target.config.architectures or [])
        if untied or target.relabelled or dtype or not known:
            _write_config(target, new, bool(untied), dtype)
    notes = [f"{', '.join(untied)} shared one weight; each has its own now"] if untied else []
    return Written(target.auto_model, len(plan.sites), *work.losses(), [*plan.left_out, *notes])


class _Work:
    """Values of the merged model's tensors, and what cutting and rounding lost of them."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        others: Mapping[str, str],
        rank: int | None,
        error: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.plan, self.target, self.others = plan, target, others
        self.rank, self.error, self._dtype = rank, error, dtype
        self.sites = {f"{site}.weight": site for site in plan.sites}
        self._missed = self._change = self._lost = self._norm = 0.0

    def value(self, name: str) -> Tensor:
        """A tensor of the merged model in its dtype."""
        source = self.target.source(name)
        own = self.others.get(name)
        if own is not None:
            tensor = self.plan.head(own) if own in self.plan.heads else self.plan.copy(own)
        else:
            assert source is not None
            tensor = source.read()
        to = self.dtype(name, tensor.dtype)
        return self._changed(tensor, self.sites[name], to) if name in self.sites else tensor.to(to)

    def dtype(self, name: str, own: torch.dtype) -> torch.dtype:
        """What a tensor is stored in; `own` is its dtype where the model has none like it."""
        source, usual = self.target.source(name), getattr(self.target.config, "dtype", None)
        own = source.dtype if source else own
        if not own.is_floating_point:
            return own
        return self._dtype or (usual if not source and isinstance(usual, torch.dtype) else own)

    def _changed(self, weight: Tensor, site: str, to: torch.dtype) -> Tensor:
        update = self._update(site)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        turned = wide.T if self.target.turned(site) else wide
        if isinstance(update, LowRank):
            turned.addmm_(update.left.to(wide.dtype), update.right.to(wide.dtype))
        else:
            turned.add_(update)
        rounded = wide.to(to)
        if not finite(rounded):
            raise UserError(f"{site}: is not finite in {to} once changed; choose another --dtype")
        if rounded.dtype != wide.dtype:
            self._norm += wide.norm().item() ** 2
            pairs = zip(wide.split(_ROWS), rounded.split(_ROWS))
            self._lost += sum((w - r).norm().item() ** 2 for w, r in pairs)
        return rounded

    def _update(self, site: str) -> LowRank | Tensor:
        (whole,) = self.plan.sums(site)
        if self.rank is None and not self.error:
            return whole.update
        found: Reduced = reduce(whole, self.rank, self.error)
        self._missed += found.missed**2
        self._change += found.norm**2
        return found.factors

    def losses(self) -> tuple[float, float]:
        """What cutting lost of the update and rounding of the weights, both relative."""
        missed = (self._missed / self._change) ** 0.5 if self._change else 0.0
        return missed, (self._lost / self._norm) ** 0.5 if self._norm else 0.0

    def size(self, names: Sequence[str]) -> int:
        """Bytes of these tensors."""
        return sum(
            torch.Size(self._shape(name)).numel() * self.dtype(name, torch.float32).itemsize
            for name in names
        )

    def largest(self) -> int:
        """Bytes that the largest changed layer takes while it is changed."""
        weights = [3 * 4 * torch.Size(self._shape(name)).numel() for name in self.sites]
        return max(weights) + max(working_bytes(self.plan, site) for site in self.plan.sites)

    def _shape(self, name: str) -> Sequence[int]:
        source = self.target.source(name)
        return source.shape if source else self.plan.adapters[0].others[self.others[name]]


def _parameter(key: str) -> str:
    """The model's name for what an adapter saved besides its factors."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _untied(target: Target, changed: set[str]) -> list[str]:
    """Names that share a weight of which not all will be the same any more."""
    names = sorted({n for name in changed for n in target.tied(name) if len(target.tied(name)) > 1})
    ends = (target.net.get_input_embeddings(), target.net.get_output_embeddings())
    embeddings = {n for n, m in target.net.named_modules(remove_duplicate=False) if m in ends}
    for name in names:
        if name.removesuffix(".weight") not in embeddings:
            raise UserError(
                f"--into-base: {name} shares its weight with other layers of a "
                f"{type(target.net).__name__}; it cannot be changed alone. Merge into an adapter"
            )
    return names


def _write_shards(work: _Work, new: Path, extra: Sequence[str]) -> None:
    shards: dict[str, list[str]] = {}
    for name, stored in work.target.stored.items():
        shards.setdefault(stored.file.name, []).append(name)
    shards[max(shards)] += extra
    total = 0
    for file, names in shards.items():
        with tensor_file(new / file, names) as made:
            total += _write_tensors(work, made, names)
    if (work.target.folder / INDEX).is_file() and INDEX not in shards:
        where = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensors(work: _Work, made: TensorFile, names: Sequence[str]) -> int:
    total = 0
    for name in names:
        tensor = work.value(name)
        made.add(name, tensor)
        total += tensor.nbytes
    return total


def _copy_files(target: Target, new: Path) -> None:
    """Config, tokenizer, licence and the like; no weights, and no card that is about another."""
    for file in sorted(target.folder.iterdir()):
        wanted = file.suffix not in _NOT_COPIED and not file.name.endswith(".index.json")
        if file.is_file() and wanted and not file.name.startswith((".", "README")):
            shutil.copyfile(file, new / file.name)


def _write_config(target: Target, new: Path, untied: bool, dtype: torch.dtype | None) -> None:
    config = target.config
    config.architectures = [type(target.net).__name__]
    if untied:
        config.tie_word_embeddings = False
    if dtype:
        config.dtype = dtype
    config.save_pretrained(new)
