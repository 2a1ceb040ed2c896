"""The weighted mean (or sum) of adapters' updates added to a full model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.disk import new_directory
from fedex_lora.errors import UserError
from fedex_lora.lowrank import LowRank
from fedex_lora.merge.checkpoint import INDEX
from fedex_lora.merge.factors import Reduced, finite, reduce
from fedex_lora.merge.names import Group
from fedex_lora.merge.plan import Plan
from fedex_lora.merge.quantised import requantised
from fedex_lora.merge.room import check_memory, check_place
from fedex_lora.merge.target import Spot, Target, open_target
from fedex_lora.merge.tensor_file import TensorFile, tensor_file
from fedex_lora.merge.write import working_bytes

# weights in other forms, and what is written anew
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece")
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
    quantised: str | None = None,
) -> Written:
    """Writes `model` with the weighted mean of the adapters' updates in its weights.

    The sum is taken in float32 (float64 for a float64 model) and rounded once. Shards and tensors
    keep their names; one tensor is in memory at a time (of a mixture's experts those that one
    parameter is made of). A weight that was tied to another one and is changed gets its own tensor,
    and `tie_word_embeddings` becomes false.

    Args:
        model: A folder or hub id.
        rank: The largest rank of a layer's update; `error`: see `merge.write.Options`.
        dtype: Of all floating tensors; by default that of each in `model`.
        quantised: How the base was quantised when the adapters were trained (of
            `quantised.KINDS`): its linear layers get the values that they had then.

    Raises:
        UserError: The adapters do not fit the model; `out` is in use, lies in an input or cannot
            be written; too little disk or memory.
    """
    trained = {key: _shape(plan, key) for key in plan.heads}
    copies = {key: _shape(plan, key) for key in plan.copies}
    target = open_target(model, plan.adapters[0], plan.sites, trained, copies)
    work = _Work(plan, target, rank, error, dtype, quantised)
    inputs = [target.folder, *(adapter.folder for adapter in plan.adapters)]
    check_place(out, inputs, work.size())
    check_memory(work.largest())
    with new_directory(out, "the merged model", "merge again") as new:
        _copy_files(target, new)
        notes = _copy_tokenizer(plan, new) if target.enlarged else []
        _write_shards(work, new)
        _write_config(target, new, work, dtype)
    if work.untied:
        notes.append(f"{', '.join(work.untied)} shared one weight; each has its own now")
    if any(s.packed for s in target.stored.values()):
        notes.append(
            "the model was quantised; its weights are written as they were multiplied with"
        )
    left_out = [*plan.left_out, *notes]
    return Written(target.auto_model, len(plan.sites), *work.losses(), left_out)


def _shape(plan: Plan, key: str) -> tuple[int, ...]:
    return (plan.copies.get(key) or plan.adapters[0]).others[key]


class _Work:
    """Values of the merged model's tensors, and what cutting and rounding lost of them.

    Attributes:
        names: Of all tensors that are written, by the shard they go to.
        untied: Parameters that shared a weight with another one.
        added: Names of tensors that the model did not have.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        rank: int | None,
        error: float,
        dtype: torch.dtype | None,
        quantised: str | None,
    ) -> None:
        self.plan, self.target, self.rank, self.error = plan, target, rank, error
        self._dtype, self._quantised = dtype, quantised
        self._quantisable = target.quantisable() if quantised else set()
        self.others = {target.parameter(key): key for key in [*plan.heads, *plan.copies]}
        first = plan.adapters[0]
        self._spots = {site: target.spot(first, site) for site in plan.sites}
        self.parameter = {key: name for name, key in target.names.direct.items()}
        changed = {spot.parameter for spot in self._spots.values() if spot.parameter}
        self.untied = _untied(plan, target, self.others, changed)
        new = {*self.others, *self.untied} - set(target.names.direct)
        # tied ones that stay so are there under another name
        new -= {n for n in new if n not in self.untied and target.source(n) is not None}
        self.added = {target.names.on_disk(name): name for name in sorted(new)}
        self._of_key: dict[str, list[str]] = defaultdict(list)
        self._of_group: dict[int, list[str]] = defaultdict(list)
        for site, spot in self._spots.items():
            if spot.group is not None:
                self._of_group[id(spot.group)].append(site)
            else:
                self._of_key[self._written_as(spot)].append(site)
        self._group_of = {
            key: spot.group
            for spot in self._spots.values()
            if spot.group is not None
            for key in spot.group.keys
        }
        self._waiting: dict[str, Tensor] = {}  # updates of tensors of a group
        self._missed = self._change = self._lost = self._norm = 0.0

    def _name(self, key: str) -> str | None:
        """The parameter that a tensor on disk is; one tied to it, if the adapters bring that."""
        name = self.added.get(key) or self.parameter.get(key)
        tied = self.target.tied(name) if name else []
        if name in self.untied:  # what was trained is no longer its weight, a copy of it is
            tied = [n for n in tied if self.others.get(n) in self.plan.copies]
        return next((n for n in [name, *tied] if n in self.others), name)

    def _written_as(self, spot: Spot) -> str:
        """The name on disk of what is changed; a tied parameter's own if it gets one."""
        own = {name: key for key, name in self.added.items()}
        assert spot.key is not None
        return own.get(spot.parameter or "", spot.key)

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors by the file that they go to."""
        found: dict[str, list[str]] = {}
        for key, stored in self.target.stored.items():
            found.setdefault(stored.file.name, []).append(key)
        found[max(found)] += self.added
        return found

    def value(self, key: str) -> Tensor:
        """A tensor of the merged model in its dtype."""
        tensor = self._before(key, self._name(key))
        to = self.dtype(key, tensor.dtype)
        if key not in self._of_key and key not in self._group_of:
            return tensor.to(to)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for site in self._of_key.get(key, []):
            self._add(wide, site)
        if key in self._group_of:
            if key not in self._waiting:
                self._waiting |= self._update_of(self._group_of[key])
            wide += self._waiting.pop(key)
        return self._rounded(wide, key, to)

    def _before(self, key: str, name: str | None) -> Tensor:
        """What the updates of a tensor are added to."""
        own, source = self.others.get(name or ""), self._source(key)
        if own is not None and own in self.plan.copies:
            return self.plan.copy(own)
        if own is not None:
            fits = source is not None and source.shape == _shape(self.plan, own)
            return self.plan.head(own, source.read() if fits and self.plan.is_sum else None)
        assert source is not None
        tensor = source.read()
        if self._quantised is None or source.packed or name not in self._quantisable:
            return tensor
        assert name is not None
        if self.target.is_turned(name):
            return requantised(tensor.T, self._quantised).T
        return requantised(tensor, self._quantised)

    def _source(self, key: str) -> Any:
        found = key if key in self.target.stored else self.target.source(self.added[key])
        return None if found is None else self.target.stored[found]

    def dtype(self, key: str, own: torch.dtype) -> torch.dtype:
        """What a tensor is stored in; `own` is its dtype where the model has none like it."""
        source, usual = self._source(key), getattr(self.target.config, "dtype", None)
        own = source.dtype if source else own
        if not own.is_floating_point:
            return own
        return self._dtype or (usual if not source and isinstance(usual, torch.dtype) else own)

    def _add(self, wide: Tensor, site: str) -> None:
        """Adds a layer's update to the tensor that holds it, or to the matrices of its experts."""
        parts = wide if wide.dim() == 3 else [wide]
        for matrix, update in zip(parts, self._updates(site)):
            turned = matrix.T if self._spots[site].turned else matrix
            if isinstance(update, LowRank):
                turned.addmm_(update.left.to(wide.dtype), update.right.to(wide.dtype))
            else:
                turned.add_(update)

    def _update_of(self, group: Group) -> dict[str, Tensor]:
        """The updates of the tensors on disk that a group's parameters are made of."""
        shapes = {key: self.target.stored[key].shape for key in group.keys}
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        update = {name: torch.zeros(t.shape) for name, t in group.forward(meta).items()}
        for site in self._of_group[id(group)]:
            self._add(update[self._spots[site].parameter or ""], site)
        return group.back(update, shapes)

    def _updates(self, site: str) -> Iterator[LowRank | Tensor]:
        for whole in self.plan.sums(site):
            if self.rank is None and not self.error:
                yield whole.update
                continue
            found: Reduced = reduce(whole, self.rank, self.error)
            self._missed += found.missed**2
            self._change += found.norm**2
            yield found.factors

    def _rounded(self, wide: Tensor, key: str, to: torch.dtype) -> Tensor:
        rounded = wide.to(to)
        if not finite(rounded):
            raise UserError(f"{key}: is not finite in {to} once changed; choose another --dtype")
        if rounded.dtype != wide.dtype:
            self._norm += wide.norm().item() ** 2
            pairs = zip(wide.split(_ROWS), rounded.split(_ROWS))
            self._lost += sum((w - r).norm().item() ** 2 for w, r in pairs)
        return rounded

    def losses(self) -> tuple[float, float]:
        """What cutting lost of the update and rounding of the weights, both relative."""
        missed = (self._missed / self._change) ** 0.5 if self._change else 0.0
        return missed, (self._lost / self._norm) ** 0.5 if self._norm else 0.0

    def size(self) -> int:
        """Bytes of all tensors."""
        keys = [key for names in self.shards().values() for key in names]
        return sum(_numel(self._final(k)) * self.dtype(k, torch.float32).itemsize for k in keys)

    def largest(self) -> int:
        """Bytes that the largest changed layer takes while it is changed."""
        weights = [3 * 4 * _numel(self._final(key)) for key in self._of_key]
        groups = {id(group): group for group in self._group_of.values()}
        for group in groups.values():  # two of a layer may be in memory together
            held = sum(_numel(self.target.stored[key].shape) for key in group.keys)
            weights.append(2 * 4 * 4 * held)
        return max(weights) + max(working_bytes(self.plan, site) for site in self.plan.sites)

    def _final(self, key: str) -> Sequence[int]:
        own = self.others.get(self._name(key) or "")
        return self._source(key).shape if own is None else _shape(self.plan, own)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _untied(plan: Plan, target: Target, others: Mapping[str, str], changed: set[str]) -> list[str]:
    """Names that share a weight of which not all will be the same any more."""
    found = set()
    for name in sorted({*others, *changed}):
        names = target.tied(name)
        if len(names) > 1 and not _stay_equal(plan, names, others, changed):
            found |= set(names)
    ends = (target.net.get_input_embeddings(), target.net.get_output_embeddings())
    embeddings = {n for n, m in target.net.named_modules(remove_duplicate=False) if m in ends}
    for name in sorted(found):
        if name.removesuffix(".weight") not in embeddings:
            raise UserError(
                f"--into-base: {name} shares its weight with other layers of a "
                f"{type(target.net).__name__}; it cannot be changed alone. Merge into an adapter"
            )
    return sorted(found)


def _stay_equal(
    plan: Plan, names: Sequence[str], others: Mapping[str, str], changed: set[str]
) -> bool:
    """Whether the adapters bring the same for all of these, or a copy of what they shared."""
    given = [others[name] for name in names if name in others]
    copied = all(key in plan.copies for key in given)
    if any(name in changed for name in names) or (len(given) < len(names) and not copied):
        return False
    tensors = [plan.copy(key) if key in plan.copies else plan.head(key) for key in given]
    return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])


def _write_shards(work: _Work, new: Path) -> None:
    shards, total = work.shards(), 0
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


def _copy_tokenizer(plan: Plan, new: Path) -> list[str]:
    """The tokenizer that the adapters brought, for a vocabulary that is theirs."""
    for adapter in plan.adapters:
        files = [f for f in sorted(adapter.folder.iterdir()) if f.name.startswith(_TOKENIZER)]
        if files:
            for file in files:
                shutil.copyfile(file, new / file.name)
            return [f"the vocabulary is the adapters'; the tokenizer is that of {adapter.name}"]
    return [
        "the vocabulary is the adapters', and none of them has a tokenizer: the model's own is "
        "there; put that in its place with which they were trained"
    ]


def _write_config(target: Target, new: Path, work: _Work, dtype: torch.dtype | None) -> None:
    """The model's config with what has changed; else it is left byte for byte."""
    file = new / "config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    text = target.config.get_text_config()
    within = [k for k in target.config.sub_configs if getattr(target.config, k, None) is text]
    parts = [own, *(own[key] for key in within if isinstance(own.get(key), dict))]
    changed = json.dumps(own)
    if work.untied:
        for part in parts:
            part["tie_word_embeddings"] = False
    if target.enlarged:
        for part in parts:
            if "vocab_size" in part or part is parts[-1]:
                part["vocab_size"] = text.vocab_size
    if target.relabelled:
        own["id2label"] = {str(i): name for i, name in target.config.id2label.items()}
        own["label2id"] = target.config.label2id
    if dtype:
        for part in parts:
            key = "torch_dtype" if "torch_dtype" in part else "dtype"
            part[key] = str(dtype).removeprefix("torch.")
    if any(stored.packed for stored in target.stored.values()):
        own.pop("quantization_config", None)
    if set(work.added.values()) - set(work.untied) or not own.get("architectures"):
        own["architectures"] = [type(target.net).__name__]
    if json.dumps(own) != changed:
        file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
