"""Whether adapters go together, and what of them is merged with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.errors import DataError, RecipeError, some
from fedex_lora.merge.adapters import WHERE, Adapter, Shape
from fedex_lora.merge.factors import Sum, Term, weighted_sum
from fedex_lora.merge.tokens import of_tokens
from fedex_lora.model.config import hub_id


@dataclass(frozen=True)
class Plan:
    """What will be merged.

    Attributes:
        adapters: At least one.
        weights: One each; they sum to 1 unless `is_sum`.
        layers: Layers that are merged, sorted.
        heads: Keys of tensors that were trained in full: they are averaged.
        copies: Keys of tensors that PEFT saved with the adapter though they were not trained
            (embeddings), and the adapter that they are taken from; the same in all if None.
        left_out: What only some adapters have, and differences that were passed over.
        is_sum: Whether the weights are taken as they are.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    layers: Sequence[str]
    heads: Sequence[str]
    copies: Mapping[str, Adapter | None]
    left_out: Sequence[str]
    is_sum: bool = False

    def sums(self, layer: str) -> Iterator[Sum]:
        """Σ wᵢ·sᵢ·BᵢAᵢ of a layer, of one expert after the other."""
        experts, rank = self.experts(layer), self.rank(layer)
        if experts == 1:
            terms: Iterator[Term] = (adapter.terms(layer)[0] for adapter in self.adapters)
            yield weighted_sum(terms, self.weights, self.shape(layer), rank)
            return
        for own in zip(*(adapter.terms(layer) for adapter in self.adapters)):
            yield weighted_sum(own, self.weights, self.shape(layer), rank)

    def shape(self, layer: str) -> tuple[int, int]:
        """ΔW's (out, in)."""
        form = self.adapters[0].places[layer].shape
        return form.out, form.inp

    def experts(self, layer: str) -> int:
        """How many matrices of that shape the layer has."""
        return self.adapters[0].places[layer].experts

    def rank(self, layer: str) -> int:
        """Σ rᵢ, the most that the sum can have."""
        return sum(adapter.places[layer].shape.rank for adapter in self.adapters)

    def saved_shape(self, key: str) -> Shape:
        """Of one of `heads` and `copies`."""
        return (self.copies.get(key) or self.adapters[0]).others[key]

    def head(self, key: str, pretrained: Tensor | None = None) -> Tensor:
        """Σ wᵢ·xᵢ of a tensor, taken as x₁ + Σ wᵢ(xᵢ − x₁) in float32; x₁'s dtype.

        Args:
            pretrained: W0; if given, the result is W0 + Σ wᵢ(xᵢ − W0), whatever the weights.

        Raises:
            UserError: It holds whole numbers that differ, or the weights do not sum to 1 and there
                is no W0.
        """
        first = self.adapters[0].tensors([key])[0]
        if not first.is_floating_point():
            self._check_equal(key)
            return first
        if pretrained is None and self.is_sum and not math.isclose(sum(self.weights), 1):
            raise RecipeError(
                f"`sum`: {key} was trained in full: it is no update, and a sum of such tensors "
                f"with weights that sum to {sum(self.weights):g} means nothing. With `into_base` "
                "it is taken as an update of the base's own, if that has one; without `sum` it is "
                "averaged"
            )
        start = first if pretrained is None else pretrained
        start = start.to(torch.promote_types(first.dtype, torch.float32))
        change = torch.zeros_like(start)
        for adapter, weight in zip(self.adapters, self.weights):
            change.add_(adapter.tensors([key])[0].to(start.dtype) - start, alpha=weight)
        return (start + change).to(first.dtype)

    def copy(self, key: str) -> Tensor:
        """A tensor that is the same in all, or that of the adapter it is to be taken from.

        Raises:
            UserError: It is not the same.
        """
        chosen = self.copies[key]
        if chosen is None:
            self._check_equal(key)
        return (chosen or self.adapters[0]).tensors([key])[0]

    def _check_equal(self, key: str) -> None:
        first = self.adapters[0]
        for other in self.adapters[1:]:
            if not torch.equal(first.tensors([key])[0], other.tensors([key])[0]):
                raise DataError(
                    f"{first.name} and {other.name} differ in {key}, which is no LoRA factor and "
                    "not in modules_to_save: they were trained on different base models, or each "
                    "added rows of its own to the vocabulary. `embeddings=mean` averages what "
                    "differs, `embeddings=1` takes that of the first adapter (2: of the second)"
                )


def make_plan(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    strict: bool,
    *,
    is_sum: bool = False,
    ignore_base_name: bool = False,
    embeddings: str = "equal",
) -> Plan:
    """Checks that the adapters go together.

    Args:
        weights: One each, relative to each other; None for equal ones.
        strict: Whether every difference in base model, layers and trained modules is an error.
            If not, what all adapters share is merged and the rest left out: a layer that an
            adapter lacks has the update 0 there, so the result is not the mean of whole updates.
        is_sum: Take the weights as they are (1 by default), also negative ones.
        ignore_base_name: Whether base models and revisions may have different names.
        embeddings: What becomes of embeddings that were saved along and not trained: they must be
            "equal", or the "mean" or those of one adapter ("1", "2", ...) are taken.

    Raises:
        UserError: What differs, by name.
    """
    shares = as_given(weights, len(adapters)) if is_sum else normalised(weights, len(adapters))
    source = _source(adapters, embeddings)
    names = list(_base_names(adapters))
    problems = list(_differences(adapters, source))
    if strict and (problems or (names and not ignore_base_name)):
        shown = problems if ignore_base_name else [*names, *problems]
        ways = ["`strict=False` merges what all of them share and leaves out the rest"]
        if names and not ignore_base_name:
            ways.append("`ignore_base_name=True` passes over the names of base models alone")
        raise DataError(
            "the adapters do not go together:\n"
            + "\n".join(f"  {problem}" for problem in shown)
            + "\n"
            + "\n".join(ways)
        )
    _check_shapes(adapters)
    for field in WHERE:
        for told in _settings(adapters, field, lambda c, field=field: c.get(field) or None):
            raise DataError(f"{told}: no adapter adds their mean; merge those that are alike")
    layers = sorted(set.intersection(*(set(a.places) for a in adapters)))
    if not layers:
        raise DataError("no layer is adapted by all of the adapters; there is nothing to merge")
    shared = [
        key for key in sorted(adapters[0].others) if len({a.others.get(key) for a in adapters}) == 1
    ]
    heads = [k for k in shared if embeddings == "mean" or all(_trained(a, k) for a in adapters)]
    copies: dict[str, Adapter | None] = dict.fromkeys(k for k in shared if k not in heads)
    if source is not None:
        copies = {key: source for key in source.others if key not in heads}
    dumped = [
        f"{a.left_out} tensors of the base model that are in {a.name}"
        for a in adapters
        if a.left_out
    ]
    return Plan(adapters, shares, layers, heads, copies, [*names, *problems, *dumped], is_sum)


def _source(adapters: Sequence[Adapter], embeddings: str) -> Adapter | None:
    """The adapter whose embeddings are taken, if it is to be one."""
    if embeddings in ("equal", "mean"):
        return None
    if not embeddings.isdecimal() or not 1 <= int(embeddings) <= len(adapters):
        raise RecipeError(
            f"`embeddings`: {embeddings!r} is neither equal nor mean nor the number of an adapter, "
            f"1 to {len(adapters)}"
        )
    return adapters[int(embeddings) - 1]


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1.

    Raises:
        UserError: Their number is wrong, or one is negative, infinite or no number, or all are 0.

    Example:
        >>> normalised([3, 1], 2)
        [0.75, 0.25]
    """
    if weights is None:
        return [1 / count] * count
    for weight in _counted(weights, count):
        if weight < 0:
            raise RecipeError(
                f"`weights`: {weight:g} is negative, and a mean has no negative weights; "
                "`sum=True` takes them as they are: Σ wᵢ·ΔWᵢ, not divided by their sum"
            )
    total = math.fsum(weights) if math.isfinite(sum(weights)) else math.inf  # fsum cannot say so
    if not (total > 0 and math.isfinite(total)):
        raise RecipeError("`weights`: their sum is 0 or too large; at least one must be above 0")
    return [weight / total for weight in weights]


def as_given(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights of a sum, 1 by default.

    Raises:
        UserError: Their number is wrong, one is infinite or no number, or all are 0.

    Example:
        >>> as_given([1, -0.5], 2), as_given(None, 2)
        ([1.0, -0.5], [1.0, 1.0])
    """
    if weights is None:
        return [1.0] * count
    if not any(_counted(weights, count)):
        raise RecipeError("`weights`: all are 0; at least one must be another number")
    return [float(weight) for weight in weights]


def _counted(weights: Sequence[float], count: int) -> Sequence[float]:
    if len(weights) != count:
        raise RecipeError(
            f"`weights`: {len(weights)} weights for {count} adapters; give one for each, in order"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise RecipeError(f"`weights`: {weight} is no weight; expected finite numbers")
    return weights


def _base_names(adapters: Sequence[Adapter]) -> Iterator[str]:
    yield from _settings(adapters, "base model", lambda c: _base(c.get("base_model_name_or_path")))
    yield from _settings(
        adapters, "revision of the base model", lambda c: c.get("revision") or "main"
    )


def _differences(adapters: Sequence[Adapter], source: Adapter | None) -> Iterator[str]:
    yield from _settings(adapters, "task_type", lambda c: c.get("task_type"))
    yield from _settings(adapters, "bias", lambda c: c.get("bias") or "none")
    tokens = "trainable_token_indices"
    yield from _settings(adapters, tokens, lambda c: c.get(tokens) or None)
    # embeddings that are taken from one adapter may be absent in others, or of another size there
    others = [
        {key: shape for key, shape in a.others.items() if source is None or _trained(a, key)}
        for a in adapters
    ]
    everywhere = [("layers", [set(a.places) for a in adapters])]
    everywhere += [("trained modules", [set(own) for own in others])]
    for what, names in everywhere:
        common = set.intersection(*names)
        for adapter, own in zip(adapters, names):
            if own - common:
                told = some(sorted(own - common), 3)
                yield f"{what} that not all adapters have, in {adapter.name}: {told}"
    for key in sorted(set.intersection(*(set(own) for own in others))):
        if len({own[key] for own in others}) > 1:
            shapes = ", ".join(f"{a.name} {own[key]}" for a, own in zip(adapters, others))
            way = "" if _trained(adapters[0], key) else "; `embeddings=1` takes those of the first"
            yield f"shape of {key}: {shapes}{way}"


def _settings(
    adapters: Sequence[Adapter], what: str, get: Callable[[Mapping[str, Any]], Any]
) -> Iterator[str]:
    values = [get(a.config) for a in adapters]
    if any(value != values[0] for value in values):
        yield f"{what}: " + ", ".join(f"{a.name} {v!r}" for a, v in zip(adapters, values))


def _base(name: Any) -> Any:
    """A local folder by its place, whatever way leads to it; the hub's cache by the hub's id."""
    if not isinstance(name, str) or not name:
        return name
    if cached := hub_id(name):
        return cached
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name.rstrip("/")


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    """One layer of two shapes or kinds: the base models differ, whatever their names say."""
    first = adapters[0]
    for other in adapters[1:]:
        for layer in sorted(set(first.places) & set(other.places)):
            places = [a.places[layer] for a in (first, other)]
            forms = [(p.experts, p.shape.out, p.shape.inp, p.embedding) for p in places]
            if forms[0] != forms[1]:
                texts = [
                    (f"{n} × " if n > 1 else "") + f"{o} × {i}" + (" (embedding)" if e else "")
                    for n, o, i, e in forms
                ]
                tokens = places[0].embedding or layer.endswith(("lm_head", "embed_out"))
                raise DataError(
                    f"{layer}: ΔW is {texts[0]} in {first.name} and {texts[1]} in {other.name}; "
                    "they belong to different base models"
                    + (", or to vocabularies of different sizes" if tokens else "")
                )


def _trained(adapter: Adapter, key: str) -> bool:
    """Whether the tensor was trained, and not just saved along."""
    config = adapter.config
    biases = config.get("bias") or "none"
    if of_tokens(key) or (key.endswith(".bias") and biases != "none"):
        return True
    # then PEFT names one of the two embeddings and saves both
    tied = bool(config.get("ensure_weight_tying")) and ".base_layer." not in key
    return tied or within(key, config.get("modules_to_save") or [])


def within(key: str, modules: Iterable[str]) -> bool:
    """Whether a tensor lies in one of these modules, by the ends of names as PEFT takes it.

    Example:
        >>> within("base_model.model.classifier.dense.weight", ["classifier"])
        True
        >>> within("base_model.model.pre_classifier.weight", ["classifier"])
        True
    """
    parts = key.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in modules)
