"""What the tensors of a full model become when adapters are merged into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import DataError, StorageError
from fedex_lora.merge.checkpoint import Stored
from fedex_lora.merge.factors import Reduced, finite, reduce
from fedex_lora.merge.names import Group
from fedex_lora.merge.plan import Plan
from fedex_lora.merge.quantised import requantised
from fedex_lora.merge.target import Spot, Target, vocabulary
from fedex_lora.merge.tokens import embedding_of, indices, of_tokens
from fedex_lora.merge.write import working_bytes

_ROWS = 1024  # of a weight whose rounding is measured at a time


class Values:
    """Values of the merged model's tensors, and what cutting and rounding lost of them.

    Attributes:
        others: What adapters saved besides factors, by the parameter that it is.
        untied: Parameters that shared a weight with another one.
        added: Parameters that the model's files do not have, by their names there.
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
        saved = [*plan.heads, *plan.copies]
        self.others = {target.parameter(key): key for key in saved if not of_tokens(key)}
        self._tokens = {target.parameter(embedding_of(k)): k for k in saved if of_tokens(k)}
        first = plan.adapters[0]
        self._spots = {layer: target.spot(first, layer) for layer in plan.layers}
        self.parameter = {key: name for name, key in target.names.direct.items()}
        changed = {spot.parameter for spot in self._spots.values() if spot.parameter}
        self.untied = _untied(plan, target, self.others, changed)
        new = {*self.others, *self.untied} - set(target.names.direct)
        # tied ones that stay so are there under another name
        new -= {n for n in new if n not in self.untied and target.source(n) is not None}
        self.added = {target.names.on_disk(name): name for name in sorted(new)}
        self._of_key: dict[str, list[str]] = defaultdict(list)
        self._of_group: dict[int, list[str]] = defaultdict(list)
        for layer, spot in self._spots.items():
            if spot.group is not None:
                self._of_group[id(spot.group)].append(layer)
            else:
                self._of_key[self._written_as(spot)].append(layer)
                self._check_whole(self._written_as(spot), spot)
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

    def _check_whole(self, key: str, spot: Spot) -> None:
        """A tensor on disk must have the shape that the model's config gives it."""
        needed = self.target.names.shape(spot.parameter or "")
        if needed is not None and needed != tuple(self._final(key)):
            raise StorageError(
                f"`into_base`: {key} is {tuple(self._final(key))} in the files of "
                f"{self.target.folder} and {needed} by its config.json; the model is damaged"
            )

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors by the file that they go to."""
        found: dict[str, list[str]] = {}
        for key, stored in self.target.stored.items():
            found.setdefault(stored.file.name, []).append(key)
        found[max(found)] += self.added
        return found

    def value(self, key: str) -> Tensor:
        """A tensor of the merged model in its dtype."""
        tensor = self._with_tokens(key, self._before(key, self._name(key)))
        to = self.dtype(key, tensor.dtype)
        if key not in self._of_key and key not in self._group_of:
            return tensor.to(to)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for layer in self._of_key.get(key, []):
            self._add(wide, layer)
        if key in self._group_of:
            if key not in self._waiting:
                self._waiting |= self._update_of(self._group_of[key])
            wide += self._waiting.pop(key)
        rounded = wide.to(to)
        if not finite(rounded):
            raise DataError(f"{key}: is not finite in {to} once changed; choose another `dtype`")
        if rounded.dtype != wide.dtype:
            self._norm += wide.norm().item() ** 2
            pairs = zip(wide.split(_ROWS), rounded.split(_ROWS))
            self._lost += sum((w - r).norm().item() ** 2 for w, r in pairs)
        return rounded

    def _before(self, key: str, name: str | None) -> Tensor:
        """What the updates of a tensor are added to."""
        own, source = self.others.get(name or ""), self._source(key)
        if own is not None and own in self.plan.copies:
            return self.plan.copy(own)
        if own is not None:
            asked = source if self.plan.is_sum else None
            fits = asked is not None and asked.shape == self.plan.saved_shape(own)
            return self.plan.head(own, asked.read() if asked and fits else None)
        assert source is not None
        tensor = source.read()
        if self._quantised is None or source.packed or name not in self._quantisable:
            return tensor
        assert name is not None
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DataError(
                f"`base_quantised`: {key} has dtype {tensor.dtype}, which bitsandbytes does not "
                "quantise; leave it out, or name the model that the adapters were trained on"
            )
        if self.target.is_turned(name):
            return requantised(tensor.T, self._quantised).T
        return requantised(tensor, self._quantised)

    def _with_tokens(self, key: str, tensor: Tensor) -> Tensor:
        """With the rows of tokens that were trained by themselves."""
        name = self.added.get(key) or self.parameter.get(key) or ""
        own = next((self._tokens[n] for n in self.target.tied(name) if n in self._tokens), None)
        if own is None:
            return tensor
        first = self.plan.adapters[0]
        where = indices(first.name, first.config, own)
        if (
            max(where, default=0) >= len(tensor)
            or self.plan.saved_shape(own)[1:] != tensor.shape[1:]
        ):
            raise DataError(
                f"`into_base`: {first.name} trained tokens up to {max(where)} of {name}, which is "
                f"{tuple(tensor.shape)} in {self.target.folder}; save the adapters with "
                "save_embedding_layers=True, or name the model that they were trained on"
            )
        rows = self.plan.head(own, tensor[where] if self.plan.is_sum else None)
        return tensor.index_copy(0, torch.tensor(where), rows.to(tensor.dtype))

    def _source(self, key: str) -> Stored | None:
        found = key if key in self.target.stored else self.target.source(self.added[key])
        return None if found is None else self.target.stored[found]

    def dtype(self, key: str, own: torch.dtype) -> torch.dtype:
        """What a tensor is stored in; `own` is its dtype where the model has none like it."""
        source, usual = self._source(key), getattr(self.target.config, "dtype", None)
        own = source.dtype if source else own
        if not own.is_floating_point:
            return own
        return self._dtype or (usual if not source and isinstance(usual, torch.dtype) else own)

    def _add(self, wide: Tensor, layer: str) -> None:
        """Adds a layer's update to the tensor that holds it, or to the matrices of its experts."""
        parts = wide if wide.dim() == 3 else [wide]
        for matrix, update in zip(parts, self._updates(layer)):
            turned = matrix.T if self._spots[layer].turned else matrix
            if update.right is None:
                turned.add_(update.left)
            else:
                turned.addmm_(update.left.to(wide.dtype), update.right.to(wide.dtype))

    def _update_of(self, group: Group) -> dict[str, Tensor]:
        """The updates of the tensors on disk that a group's parameters are made of."""
        shapes = {key: self.target.stored[key].shape for key in group.keys}
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        update = {name: torch.zeros(t.shape) for name, t in group.forward(meta).items()}
        for layer in self._of_group[id(group)]:
            self._add(update[self._spots[layer].parameter or ""], layer)
        return group.back(update, shapes)

    def _updates(self, layer: str) -> Iterator[Delta]:
        for whole in self.plan.sums(layer):
            if self.rank is None and not self.error:
                yield whole.update
                continue
            found: Reduced = reduce(whole, self.rank, self.error)
            self._missed += found.missed**2
            self._change += found.norm**2
            yield found.factors

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
        return max(weights) + max(working_bytes(self.plan, layer) for layer in self.plan.layers)

    def _final(self, key: str) -> Sequence[int]:
        own, source = self.others.get(self._name(key) or ""), self._source(key)
        if own is not None:
            return self.plan.saved_shape(own)
        assert source is not None
        return source.shape


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _untied(plan: Plan, target: Target, others: Mapping[str, str], changed: set[str]) -> list[str]:
    """Names that share a weight of which not all will be the same any more."""
    found = set()
    for name in sorted({*others, *changed}):
        names = target.tied(name)
        if len(names) > 1 and not _stay_equal(plan, names, others, changed):
            found |= set(names)
    embeddings = vocabulary(target.net)
    for name in sorted(found):
        if name.removesuffix(".weight") not in embeddings:
            raise DataError(
                f"`into_base`: {name} shares its weight with other layers of a "
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
