"""Which parameters of a transformers model the tensors of its files become.

transformers renames tensors when it loads them, stacks a mixture's experts into one parameter,
splits and turns others. Its own tables and operations say how; they move numbers about and change
none, so that an update is taken back to the files by the same operations reversed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fedex_lora.errors import DataError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Tensors on disk that are converted together into one or more parameters.

    Attributes:
        converter: transformers' rule.
        first: The name that transformers gives the group: of its first parameter.
        sources: Names on disk by the rule's pattern that they match, in the order of its lists.
        net: The model, without numbers.
    """

    converter: Any
    first: str
    sources: dict[str, list[str]]
    net: Any

    @property
    def keys(self) -> list[str]:
        return [key for part in self.sources.values() for key in part]

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of tensors by their names on disk."""
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                converter.add_tensor(self.first, key, pattern, tensors[key])
        made = converter.convert(self.first, model=self.net, config=self.net.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def back(self, update: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The update of the tensors on disk by which the parameters get theirs.

        Args:
            update: Of all parameters of the group, in their own layout.
            shapes: Of the tensors on disk.

        Raises:
            UserError: transformers' rule does more than move numbers about.
        """
        for way in (self._reversed, self._traced):
            found = way(update, shapes)
            if found is None or {k: tuple(t.shape) for k, t in found.items()} != dict(shapes):
                continue
            there = self.forward(found)
            if all(torch.equal(there[name], tensor) for name, tensor in update.items()):
                return found
        raise DataError(
            f"`into_base`: transformers makes {self.first} of {self.keys[0]} and others by "
            f"{self.converter.operations}, which cannot be undone; merge into an adapter instead"
        )

    def _reversed(
        self, update: Mapping[str, Tensor], shapes: Mapping[str, Shape]
    ) -> dict[str, Tensor] | None:
        """By the reverse operations, which transformers saves models with."""
        rule = self.converter.reverse_transform()
        parts: dict[str, list[Tensor]] = {}
        for name, tensor in update.items():
            _, pattern = rule.rename_source_key(name)
            if pattern is None:
                return None
            parts.setdefault(pattern, []).append(tensor)
        made: Any = parts
        try:
            for operation in rule.operations:
                made = operation.convert(
                    made,
                    source_patterns=rule.source_patterns,
                    target_patterns=rule.target_patterns,
                    full_layer_name=self.first,
                    model=self.net,
                    config=self.net.config,
                    missing_keys=None,
                )
            found = {}
            for source, target in zip(self.converter.source_patterns, rule.target_patterns):
                for i, key in enumerate(self.sources.get(source, [])):
                    tensor = made[target.replace("*", str(i))]
                    found[key] = tensor[0] if isinstance(tensor, list) else tensor
        except (KeyError, ValueError, RuntimeError, IndexError, AttributeError):
            return None
        return found

    def _traced(
        self, update: Mapping[str, Tensor], shapes: Mapping[str, Shape]
    ) -> dict[str, Tensor] | None:
        """By sending the numbers' places the way that the numbers go."""
        places, total = {}, 0
        for key, shape in shapes.items():
            size = torch.Size(shape).numel()
            places[key] = torch.arange(total, total + size).reshape(shape)
            total += size
        flat = torch.zeros(total)
        for name, where in self.forward(places).items():
            flat[where.flatten()] = update[name].flatten()
        pieces = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
        return {key: piece.reshape(shapes[key]) for key, piece in zip(shapes, pieces)}


class Names:
    """The parameters that tensors on disk become.

    Attributes:
        direct: The name on disk of each parameter that one tensor becomes as it is.
        groups: The others, by parameter.
    """

    def __init__(self, net: Any, shapes: Mapping[str, Shape]) -> None:
        """
        Args:
            net: The model, without numbers.
            shapes: Of the tensors on disk.
        """
        self._net = net
        rules = get_model_conversion_mapping(net)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.direct: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        of_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}
        found: dict[str, Group] = {}
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = self._renamed(key)
            if name not in self._known:
                continue
            if pattern is None:
                self.direct[name] = key
                continue
            group = found.setdefault(name, Group(of_pattern[pattern], name, {}, net))
            group.sources.setdefault(pattern, []).append(key)
        for group in found.values():
            meta = {key: torch.empty(shapes[key], device="meta") for key in group.keys}
            try:
                made = group.forward(meta)
            except (RuntimeError, ValueError, IndexError, KeyError):
                continue  # some of the tensors are missing or of another shape
            self.groups |= {n: group for n, t in made.items() if self.shape(n) == tuple(t.shape)}

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        return self._net.state_dict()

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """As transformers does while it loads."""
        prefix = self._net.base_model_prefix
        rules = (self._renamings, self._converters)
        name, pattern = rename_source_key(key, *rules, prefix, self._known)
        if name not in self._known and key in self._known:
            # it has its new name already
            return rename_source_key(key, [], [], prefix, self._known)
        return name, pattern

    def parameter(self, key: str) -> str:
        """The parameter that a tensor of that name becomes (if alone: as it is), or its name."""
        name, _ = self._renamed(key)
        return name if name in self._known else key

    def on_disk(self, name: str) -> str:
        """What to call a parameter on disk that is not there yet."""
        reverse = [r.reverse_transform() for r in self._renamings[::-1]]
        old = name
        for rule in reverse:
            old, _ = rule.rename_source_key(old)
        return old if self._renamed(old)[0] == name else name

    def shape(self, name: str) -> Shape | None:
        """Of a parameter of the model; None if it has none of that name."""
        return tuple(self._known[name].shape) if name in self._known else None
