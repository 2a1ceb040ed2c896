"""Whether adapters go together, and what of them is merged with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.errors import UserError
from fedex_lora.merge.adapters import Adapter
from fedex_lora.merge.factors import Sum, Term, weighted_sum


@dataclass(frozen=True)
class Plan:
    """What will be merged.

    Attributes:
        adapters: At least one.
        weights: One each, summing to 1.
        sites: Layers that are merged, sorted.
        heads: Keys of tensors that were trained in full: they are averaged.
        copies: Keys of tensors that PEFT saved with the adapter though they were not trained
            (embeddings); the same in all.
        left_out: What only some adapters have, and differences that were passed over.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    sites: Sequence[str]
    heads: Sequence[str]
    copies: Sequence[str]
    left_out: Sequence[str]

    def terms(self, site: str) -> Iterator[Term]:
        """(A, B, scale) of every adapter, read one after the other."""
        return (adapter.term(site) for adapter in self.adapters)

    def shape(self, site: str) -> tuple[int, int]:
        """ΔW's (out, in)."""
        form = self.adapters[0].places[site].site
        return form.out, form.inp

    def rank(self, site: str) -> int:
        """Σ rᵢ, the most that the sum can have."""
        return sum(adapter.places[site].site.rank for adapter in self.adapters)

    def sum(self, site: str) -> Sum:
        """Σ wᵢ·sᵢ·BᵢAᵢ of a layer."""
        return weighted_sum(self.terms(site), self.weights, self.shape(site), self.rank(site))

    def head(self, key: str) -> Tensor:
        """Σ wᵢ·xᵢ of a tensor, taken as x₁ + Σ wᵢ(xᵢ − x₁) in float32; x₁'s dtype.

        Raises:
            UserError: It holds whole numbers that differ.
        """
        first = self.adapters[0].tensors([key])[0]
        if not first.is_floating_point():
            self._check_equal(key)
            return first
        wide = torch.promote_types(first.dtype, torch.float32)
        start = first.to(wide)
        change = torch.zeros_like(start)
        for adapter, weight in zip(self.adapters[1:], self.weights[1:]):
            change.add_(adapter.tensors([key])[0].to(wide) - start, alpha=weight)
        return (start + change).to(first.dtype)

    def copy(self, key: str) -> Tensor:
        """A tensor that is the same in all.

        Raises:
            UserError: It is not.
        """
        self._check_equal(key)
        return self.adapters[0].tensors([key])[0]

    def _check_equal(self, key: str) -> None:
        first = self.adapters[0]
        for other in self.adapters[1:]:
            if not torch.equal(first.tensors([key])[0], other.tensors([key])[0]):
                raise UserError(
                    f"{first.name} and {other.name} differ in {key}, which is no LoRA factor and "
                    "not in modules_to_save: they were trained on different base models"
                )


def make_plan(adapters: Sequence[Adapter], weights: Sequence[float] | None, strict: bool) -> Plan:
    """Checks that the adapters go together.

    Args:
        weights: One each, relative to each other; None for equal ones.
        strict: Whether every difference in base model, layers and trained modules is an error.
            If not, what all adapters share is merged and the rest left out: a layer that an
            adapter lacks has the update 0 there, so the result is not the mean of whole updates.

    Raises:
        UserError: What differs, by name.
    """
    shares = normalised(weights, len(adapters))
    problems = list(_differences(adapters))
    if problems and strict:
        raise UserError(
            "the adapters do not go together:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\n--no-strict merges what all of them share and leaves out the rest"
        )
    _check_shapes(adapters)
    sites = sorted(set.intersection(*(set(a.places) for a in adapters)))
    if not sites:
        raise UserError("no layer is adapted by all of the adapters; there is nothing to merge")
    others = [key for key in sorted(adapters[0].others) if _shared(adapters, key)]
    heads = [key for key in others if _trained(adapters, key)]
    copies = [key for key in others if key not in heads]
    return Plan(adapters, shares, sites, heads, copies, problems)


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
    if len(weights) != count:
        raise UserError(
            f"--weights: {len(weights)} weights for {count} adapters; give one for each, in order"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"--weights: {weight} is no weight; expected numbers of at least 0")
    total = math.fsum(weights)
    if not (total > 0 and math.isfinite(total)):
        raise UserError("--weights: their sum is 0 or too large; at least one must be above 0")
    return [weight / total for weight in weights]


def _differences(adapters: Sequence[Adapter]) -> Iterator[str]:
    yield from _settings(adapters, "base model", lambda c: _base(c.get("base_model_name_or_path")))
    yield from _settings(
        adapters, "revision of the base model", lambda c: c.get("revision") or "main"
    )
    yield from _settings(adapters, "task_type", lambda c: c.get("task_type"))
    everywhere = [("layers", [set(a.places) for a in adapters])]
    everywhere += [("trained modules", [set(a.others) for a in adapters])]
    for what, names in everywhere:
        some = set.union(*names) - set.intersection(*names)
        for adapter, own in zip(adapters, names):
            if own & some:
                yield f"{what} that not all adapters have, in {adapter.name}: {_some(own & some)}"
    for key in sorted(set.intersection(*(set(a.others) for a in adapters))):
        if len({a.others[key] for a in adapters}) > 1:
            shapes = ", ".join(f"{a.name} {a.others[key]}" for a in adapters)
            yield f"shape of {key}: {shapes}"


def _settings(
    adapters: Sequence[Adapter], what: str, get: Callable[[Mapping[str, Any]], Any]
) -> Iterator[str]:
    values = [get(a.config) for a in adapters]
    if any(value != values[0] for value in values):
        yield f"{what}: " + ", ".join(f"{a.name} {v!r}" for a, v in zip(adapters, values))


def _base(name: Any) -> Any:
    """A local folder by its place, whatever way leads to it."""
    exists = isinstance(name, str) and Path(name).expanduser().is_dir()
    return str(Path(name).expanduser().resolve()) if exists else name


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    """One layer of two shapes or kinds: the base models differ, whatever their names say."""
    first = adapters[0]
    for other in adapters[1:]:
        for site in sorted(set(first.places) & set(other.places)):
            forms = [
                (a.places[site].site.out, a.places[site].site.inp, a.places[site].embedding)
                for a in (first, other)
            ]
            if forms[0] != forms[1]:
                texts = [f"{o} × {i}{' (embedding)' if e else ''}" for o, i, e in forms]
                raise UserError(
                    f"{site}: ΔW is {texts[0]} in {first.name} and {texts[1]} in {other.name}; "
                    "they belong to different base models"
                )


def _shared(adapters: Sequence[Adapter], key: str) -> bool:
    return len({a.others.get(key) for a in adapters}) == 1


def _trained(adapters: Sequence[Adapter], key: str) -> bool:
    """Whether the tensor lies in a module that all adapters trained in full."""
    return all(_within(key, a.config.get("modules_to_save") or []) for a in adapters)


def _within(key: str, modules: Iterable[str]) -> bool:
    """Whether a tensor lies in one of these modules.

    Example:
        >>> _within("base_model.model.classifier.dense.weight", ["classifier"])
        True
    """
    return any(f".{module}." in f".{key}" for module in modules)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
