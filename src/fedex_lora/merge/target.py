"""A full model on disk, and where in its files the updates of adapters' layers belong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from fedex_lora.errors import DataError
from fedex_lora.merge.adapters import Adapter, Place, Shape
from fedex_lora.merge.checkpoint import Stored
from fedex_lora.merge.experts import module_of, targeted
from fedex_lora.merge.names import Group, Names
from fedex_lora.model.keys import PREFIX
from fedex_lora.model.layer import transposed


@dataclass(frozen=True)
class Spot:
    """Where a layer's update belongs.

    Attributes:
        key: The tensor on disk that it is added to, if it is one.
        parameter: The model's parameter, by which tied weights are found; None for a tensor on
            disk that is only a part of one.
        group: If the parameter is made of several tensors (or of a part of one): how.
        turned: Whether the weight is kept as in × out.
    """

    key: str | None
    parameter: str | None
    group: Group | None
    turned: bool


def vocabulary(net: Any) -> list[str]:
    """Names of the embeddings of tokens, the output's too; none where a model does not tell."""
    ends = []
    for get in (net.get_input_embeddings, net.get_output_embeddings):
        with suppress(NotImplementedError, AttributeError):
            ends.append(get())
    return [name for name, module in net.named_modules(remove_duplicate=False) if module in ends]


class Target:
    """A model to add updates to.

    Attributes:
        folder: Where it lies.
        config: Its transformers config, with as many labels and tokens as the adapters have.
        auto_model: The class in transformers that the adapters were trained on.
        net: The model on the meta device: names, shapes and kinds, no numbers.
        stored: Every tensor on disk, by its name there.
        names: Which parameters of `net` they become.
        relabelled: Whether the number of labels was set to that of the adapters' head.
        enlarged: Whether the vocabulary was.
    """

    def __init__(
        self, folder: Path, config: Any, auto_model: str, net: Any, stored: Mapping[str, Stored]
    ) -> None:
        self.folder, self.config, self.auto_model, self.net = folder, config, auto_model, net
        self.stored = stored
        self.names = Names(net, {key: s.shape for key, s in stored.items()})
        self.relabelled = self.enlarged = False

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        by_id: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.net.named_parameters(remove_duplicate=False):
            by_id[id(parameter)].append(name)
        return {
            name: [name] if self._differ(names) else names
            for names in by_id.values()
            for name in names
        }

    def _differ(self, names: Sequence[str]) -> bool:
        """Whether the files hold values of their own for these: transformers then ties nothing,
        whatever the config says."""
        kept = [self.stored[self.names.direct[n]] for n in names if n in self.names.direct]
        return any(not torch.equal(kept[0].read(), other.read()) for other in kept[1:])

    def tied(self, name: str) -> list[str]:
        """All names of the parameter called `name`, that one included, as it is once transformers
        has loaded the files."""
        return self._tied.get(name, [name])

    def source(self, name: str) -> str | None:
        """Where on disk the parameter's value is; a tied one is under one of its names."""
        found = [n for n in (name, *self.tied(name)) if n in self.names.direct]
        return self.names.direct[found[0]] if found else None

    def holds(self, name: str) -> bool:
        """Whether the files have the parameter's value."""
        return self.source(name) is not None or name in self.names.groups

    def value(self, name: str) -> Tensor | None:
        """The parameter's value, as transformers makes it; None where the files have none."""
        key, group = self.source(name), self.names.groups.get(name)
        if key is not None:
            return self.stored[key].read()
        return group and group.forward({k: self.stored[k].read() for k in group.keys})[name]

    def parameter(self, key: str) -> str:
        """The model's name for what an adapter saved besides its factors."""
        plain = key.removeprefix(PREFIX)
        for wrapper in (".token_adapter.", ".base_layer."):
            plain = plain.replace(wrapper, ".")
        known = self.names.shape(plain) is not None
        return plain if known else self.names.parameter(plain)

    def spot(self, adapter: Adapter, name: str) -> Spot:
        """Where a layer is.

        Raises:
            UserError: The model has no such layer, or one of another shape or kind.
        """
        place, spot = adapter.places[name], next(self._spots(adapter, name), None)
        if spot is not None:
            self._check_shape(name, place, spot)
            return self._turned(place, spot)
        ending = name.rpartition(".")[2]
        like = [n for n, _ in self.net.named_modules() if n.rpartition(".")[2] == ending][:1]
        like = [f"; there is {like[0]}"] if like else []
        raise DataError(
            f"`into_base`: {self.folder} as {type(self.net).__name__} has no layer {name}, and no "
            f"tensor of that name in its files{''.join(like)}. Name the model that the adapters "
            "were trained on"
        )

    def _spots(self, adapter: Adapter, layer: str) -> Iterator[Spot]:
        """Where it may be: in the model, in its files, under a new name, deeper within it."""
        leaves = self._leaves(adapter, layer)
        module = module_of(layer)
        for name in (f"{module}.{leaf}" for leaf in leaves):
            if self.names.shape(name) is not None:
                yield self._of_parameter(name)
        key = f"{layer}.weight"
        if key in self._parts:
            yield Spot(key, None, None, False)
        for name in (self.names.parameter(f"{module}.{leaf}") for leaf in leaves):
            if self.names.shape(name) is not None and name not in self.names.groups:
                yield self._of_parameter(name)
        for leaf in leaves:
            deeper = [n for n in self._parameters if n.endswith(f".{module}.{leaf}")]
            if len(deeper) == 1:
                yield self._of_parameter(deeper[0])
        on_disk = [k for k in self.stored if k == key or k.endswith(f".{key}")]
        if len(on_disk) == 1:
            yield Spot(on_disk[0], None, None, False)

    def _leaves(self, adapter: Adapter, layer: str) -> list[str]:
        """Names of the parameter that the layer's factors are for, within its module."""
        module, depth = module_of(layer), layer.count(".base_layer")
        named = targeted(adapter.config, module)
        if not named or (adapter.places[layer].experts == 1 and not depth and layer == module):
            return ["weight", *named]
        try:
            own = [n for n, _ in self.net.get_submodule(module).named_parameters(recurse=False)]
        except AttributeError:
            own = []
        # the first parameter of the module lies deepest within PEFT's wrappers
        order = [name for name in own if name in named] or named
        return [order[-1 - depth]] if depth < len(order) else []

    @cached_property
    def _parts(self) -> set[str]:
        """Names on disk of what is only a part of a parameter."""
        groups = {id(group): group for group in self.names.groups.values()}
        return {key for group in groups.values() for key in group.keys}

    @cached_property
    def _parameters(self) -> list[str]:
        return [name for name, _ in self.net.named_parameters(remove_duplicate=False)]

    def _of_parameter(self, name: str) -> Spot:
        owner = self.net.get_submodule(name.rpartition(".")[0])
        turned = name.endswith(".weight") and transposed(owner)
        source = self.source(name)
        if source is not None:
            return Spot(source, name, None, turned)
        if name in self.names.groups:
            return Spot(None, name, self.names.groups[name], turned)
        raise DataError(
            f"`into_base`: the files of {self.folder} hold no tensor for {name}, or not all parts "
            f"of it: they are not complete, or not those of a {type(self.net).__name__}"
        )

    def _held(self, spot: Spot) -> Shape:
        """The shape of what the update is added to."""
        shape = None if spot.parameter is None else self.names.shape(spot.parameter)
        if shape is None:
            assert spot.key is not None
            return self.stored[spot.key].shape
        return shape

    def _check_shape(self, layer: str, place: Place, spot: Spot) -> None:
        held = self._held(spot)
        own = [place.shape.out, place.shape.inp]
        for key in [spot.key] if spot.key else spot.group.keys if spot.group else []:
            if not self.stored[key].dtype.is_floating_point:
                raise DataError(
                    f"`into_base`: {key} in {self.folder} has dtype {self.stored[key].dtype}, to "
                    "which no update can be added; name the model that it was made from"
                )
        if len(held) not in (2, 3):
            kind = "x".join(map(str, held))
            raise DataError(f"`into_base`: {layer} has a weight of {kind}; cannot be changed")
        experts, sides = (1, held) if len(held) == 2 else (held[0], held[1:])
        fits = [list(sides), list(sides)[::-1]] if len(held) == 3 else [list(sides)]
        fits = [list(sides)[::-1]] if spot.turned else fits
        if experts != place.experts or own not in fits:
            times = f"{place.experts} × " if place.experts > 1 else ""
            has = " × ".join(map(str, ([experts] if len(held) == 3 else []) + fits[0]))
            raise DataError(
                f"`into_base`: {layer} is {has} in {self.folder} and {times}{own[0]} × {own[1]} in "
                f"the adapters; name the model that they were trained on{self._vocabulary(layer)}"
            )

    def _vocabulary(self, layer: str) -> str:
        if layer not in vocabulary(self.net):
            return ""
        return (
            "; if the vocabulary was enlarged, save the adapters with save_embedding_layers=True: "
            "they have no rows for the new tokens"
        )

    def _turned(self, place: Place, spot: Spot) -> Spot:
        """With the layout of stacked matrices, as PEFT takes it."""
        held = self._held(spot)
        if len(held) != 3:
            return spot
        turned = held[1:] != (place.shape.out, place.shape.inp)
        if held[1] == held[2] and spot.parameter is not None:
            owner = self.net.get_submodule(spot.parameter.rpartition(".")[0])
            turned = bool(getattr(owner, "is_transposed", False))
        return Spot(spot.key, spot.parameter, spot.group, turned)

    def is_turned(self, name: str) -> bool:
        """Whether a layer holds its weight, the parameter of that name, as in × out."""
        return transposed(self.net.get_submodule(name.removesuffix(".weight")))

    def quantisable(self) -> set[str]:
        """Parameters that transformers would quantise with `load_in_4bit`: linear layers but the
        last one."""
        kept = get_keys_to_not_convert(self.net)
        linear = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        return {f"{name}.weight" for name in linear if should_convert_module(name, kept)}
