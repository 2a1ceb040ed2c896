"""The federated LoRA methods, each a few choices in one table.

A client starts a round from the global model G and moves away from it in its adapter's
coordinates. The ideal next global model is the weighted mean of where the clients ended,

    G' = G + η · Σᵢ wᵢ·sᵢ·(BᵢAᵢ − Bᵢ⁰Aᵢ⁰).

Methods differ in what is trained, in which factors the clients get next (the assignment), and
in what becomes of the residual, the part of G' that those factors cannot express.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from fedex_lora.aggregation.assignment import (
    Alone,
    Assignment,
    Average,
    Keep,
    OwnSvd,
    Reinit,
    Svd,
    SvdAndRest,
)
from fedex_lora.aggregation.assignments.by_norm import ByNorm
from fedex_lora.aggregation.assignments.corrected import CorrectedB
from fedex_lora.aggregation.assignments.fitted import Fitted
from fedex_lora.aggregation.assignments.heads import Heads
from fedex_lora.aggregation.assignments.inner import Inner
from fedex_lora.aggregation.assignments.own_pair import OwnPair
from fedex_lora.aggregation.assignments.robust_pca import RobustPca
from fedex_lora.aggregation.assignments.shared_a import SharedA
from fedex_lora.aggregation.assignments.sketched import Sketched
from fedex_lora.aggregation.assignments.sparse_start import SparseStart
from fedex_lora.aggregation.assignments.thresholded import Thresholded
from fedex_lora.aggregation.registry import Registry
from fedex_lora.errors import RecipeError, UserError, did_you_mean

GROUP = "fedex_lora.methods"  # of entry points

Trains = Literal["both", "B", "alternate", "inner", "all"]
Residual = Literal["exact", "truncated", "partial", "dropped", "zero"]
Option = float | int | bool | str


@dataclass(frozen=True)
class Method:
    """One method: three choices, and for the baselines whose data it trains on.

    Attributes:
        trains: "both" factors; "B" only; "alternate": B in odd rounds, A in even ones; "inner": a
            matrix between them; "all" parameters of the model, without LoRA. The last two are
            trained as a head is.
        assignment: Which factors the clients get next.
        residual: "exact": all of it goes into the base; "truncated" to a rank; "partial": as much
            as the assignment gives of it; "dropped"; "zero": there is none by construction.
        source: Paper, and equations where it gives them.
        pooled: One client holds all the data.
    """

    trains: Trains
    assignment: Assignment
    residual: Residual
    source: str
    pooled: bool = False

    @property
    def in_ledger(self) -> bool:
        """Whether residuals go into the base."""
        return self.residual in ("exact", "truncated", "partial")

    @property
    def shared_base(self) -> bool:
        """Whether all clients have one base; not so if G is exact and factors differ per client."""
        return not (self.assignment.own and self.in_ledger)

    @property
    def exchanges(self) -> bool:
        """Whether anything is sent at all."""
        return not self.assignment.head_private

    @property
    def personal(self) -> bool:
        """Whether every client has a model of its own, and there is no global one: factors of its
        own, of which no increment of G is made."""
        return bool(self.assignment.own) and not self.in_ledger

    @property
    def averages(self) -> bool:
        """Whether clients get the mean of their factors."""
        return type(self.assignment) is Average

    @property
    def means_alone(self) -> bool:
        """Whether all that the server publishes is the mean of the updates."""
        inner = self.trains == "inner" and not self.assignment.gradients
        return (self.averages or inner) and not self.in_ledger

    @property
    def ranks_may_differ(self) -> bool:
        """Whether clients may have different LoRA ranks."""
        return self.trains == "both" and self.assignment.ranks_may_differ

    def unfit_for_sums(self, ranks_differ: bool = False) -> str | None:
        """Why sums over clients do not suffice for it; None if they do."""
        assignment = self.assignment
        if self.pooled or not self.exchanges:
            return "exchanges nothing, so there is nothing to sum"
        if assignment.gradients:
            return "makes its factors from gradients, which go without secure aggregation so far"
        if "ends" in assignment.needs:
            return "reads each client's factors by themselves, which no sum holds"
        if assignment.private:
            return "leaves factors with the clients, which no sum holds"
        if assignment.own and not assignment.dealt:
            return "has the coordinator keep each client's own factors, which no sum holds"
        if assignment.own and assignment.means:
            return "reads means of factors that are each client's own, which no sum is about"
        if ranks_differ and assignment.means:
            return "reads means, whose last columns would be those of the largest rank alone"
        return None

    def trained(self, round: int) -> frozenset[str]:
        """Which of the factors "A" and "B" clients train in a round (rounds count from 1).

        Example:
            >>> sorted(METHODS["rolora"].trained(1)), sorted(METHODS["rolora"].trained(2))
            (['B'], ['A'])
        """
        if self.assignment.sparse(round):
            return frozenset()
        alternate = "B" if round % 2 else "A"
        choices = {"both": "AB", "B": "B", "alternate": alternate, "inner": "", "all": ""}
        return frozenset(choices[self.trains])

    def shows_products(self, trained: frozenset[str]) -> bool:
        """Whether what is sent of `trained` decides the clients' products: no client keeps a factor
        that it trained, and nothing is trained in the place of factors."""
        return bool(trained) and self.assignment.sent_up(trained) == trained

    def sends_gradients(self, round: int) -> bool:
        """Whether clients send the gradients of the adapted layers' whole weights in a round, and
        the server makes all factors from them."""
        return self.assignment.gradients and round == 1

    def sent_down(self, round: int) -> frozenset[str]:
        """Factors that are new for all clients after a round, of "A" and "B".

        Example:
            >>> sorted(METHODS["fed-sb"].sent_down(1)), sorted(METHODS["fed-sb"].sent_down(2))
            (['A', 'B'], [])
        """
        sparse = self.assignment.sparse(round)
        if self.sends_gradients(round) or (sparse and not self.assignment.sparse(round + 1)):
            return self.assignment.shared
        return self.assignment.sent_down(self.trained(round))

    def sent(self, round: int) -> frozenset[str]:
        """What updates hold in a round, of "A", "B" and "head". Of a client that is alone it is all
        that was trained, which crosses nothing and is checked like others.

        Example:
            >>> sorted(METHODS["fedex"].sent(1)), sorted(METHODS["rolora"].sent(2))
            (['A', 'B', 'head'], ['A', 'head'])
        """
        trained = self.trained(round)
        return (self.assignment.sent_up(trained) if self.exchanges else trained) | {"head"}

    @property
    def options(self) -> dict[str, Option]:
        """The options of the assignment and their values."""
        return {
            field.name: getattr(self.assignment, field.name) for field in fields(self.assignment)
        }

    def with_options(self, given: Mapping[str, Option]) -> Method:
        """The method with some of its options set.

        Raises:
            UserError: There is no such option, or it cannot have that value.

        Example:
            >>> METHODS["florist"].with_options({"energy": 0.9}).options
            {'energy': 0.9}
        """
        if not given:
            return self
        for name, value in given.items():
            if name not in self.options:
                near = did_you_mean(name, self.options)
                known = f"; known: {', '.join(self.options)}" if self.options else "; it has none"
                raise UserError(f"method.options.{name}: there is no such option{near or known}")
            kind = type(self.options[name])
            alike = kind is float and type(value) is int
            if type(value) is not kind and not alike:
                expected = f"a{'n' if kind is int else ''} {kind.__name__}"
                raise UserError(f"method.options.{name}: expected {expected}, got {value!r}")
        changed = replace(self, assignment=replace(self.assignment, **dict(given)))
        for what in changed.assignment.problems():
            raise UserError(f"method.options.{what}")
        return changed

    def problems(self) -> Iterator[str]:
        """What contradicts itself, or is missing."""
        for field, known in (("trains", get_args(Trains)), ("residual", get_args(Residual))):
            if getattr(self, field) not in known:
                yield f"{field} is {getattr(self, field)!r}; expected one of {', '.join(known)}"
        if not (self.source and isinstance(self.source, str)):
            yield "its `source` is missing: a paper, or a few words"
        if not isinstance(self.assignment, Assignment):
            yield f"its assignment is {self.assignment!r}; expected an Assignment, as Average()"
            return
        yield from (f"its assignment: {what}" for what in self.assignment.problems())
        if self.assignment.private and self.in_ledger:
            yield f"a residual that is {self.residual} takes factors that the server does not see"
        if self.assignment.own and self.residual == "zero":
            yield "factors differ per client, so a residual is not zero: keep it, or drop it"
        if self.assignment.own and self.trains == "all":
            yield "all parameters are trained, so there are no factors that could be own"


_OWN: dict[str, Method] = {
    "fedit": Method("both", Average(), "dropped", "Zhang et al., arXiv 2305.05644"),
    "ffa": Method("B", Average(), "zero", "Sun et al., arXiv 2403.12313"),
    "fedex": Method("both", Average(), "exact", "Singhal et al., arXiv 2410.09432, eq. 5-16"),
    "fedex-svd": Method("both", Average(), "truncated", "arXiv 2410.09432, eq. 17-18"),
    "fedex-reinit": Method(
        "both", Reinit(), "exact", "arXiv 2410.09432, sec. 5; FLoRA, arXiv 2409.05976"
    ),
    "fedex-keep": Method("both", Keep(), "exact", "arXiv 2410.09432, sec. 5"),
    "fedex-hetero": Method("both", OwnSvd(), "exact", "open problem in arXiv 2410.09432, sec. 5"),
    "flexlora": Method("both", Svd(), "dropped", "Bai et al., arXiv 2402.11505"),
    "fedsvd": Method("B", Svd(), "zero", "arXiv 2505.12805"),
    "fedask": Method("B", Sketched(), "zero", "Wen et al., arXiv 2507.09990"),
    "fedask-both": Method("both", Sketched(), "dropped", "arXiv 2507.09990, without privacy"),
    "rolora": Method("alternate", Average(), "zero", "arXiv 2409.02346"),
    "fedsa": Method("both", SharedA(), "dropped", "Guo et al., arXiv 2410.01463"),
    "fedmomentum": Method("both", SvdAndRest(), "exact", "Yan et al., arXiv 2603.08014"),
    "florist": Method("both", Thresholded(), "partial", "Ramesh, Dass, arXiv 2506.09199"),
    "lora-fair": Method("both", CorrectedB(), "dropped", "Bian et al., arXiv 2411.14961"),
    "flora-na": Method("both", Fitted(), "dropped", "Nguyen et al., arXiv 2509.26399"),
    "hetlora": Method("both", ByNorm(), "dropped", "Cho et al., arXiv 2401.06432"),
    "fedrpca": Method("both", RobustPca(), "dropped", "Jhunjhunwala et al., arXiv 2506.01194"),
    "fed-sb": Method("inner", Inner(), "zero", "Singhal et al., arXiv 2502.15436"),
    "feddpa": Method("both", OwnPair(), "dropped", "Yang et al., arXiv 2403.19211"),
    "slora": Method("both", SparseStart(), "dropped", "Babakniya et al., arXiv 2308.06522"),
    "ravan": Method("inner", Heads(), "zero", "Raje et al., arXiv 2506.05568"),
    "full": Method("all", Average(), "zero", "McMahan et al., federated full fine-tuning"),
    "centralized": Method("both", Average(), "exact", "one client with all the data", pooled=True),
    "centralized-full": Method(
        "all", Average(), "zero", "full fine-tuning on all the data", pooled=True
    ),
    "local": Method("both", Alone(), "dropped", "every client alone"),
}


def _check(name: str, method: Method) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"method {name!r}: expected a name of letters, digits, '.', '_' and '-'")
    if not isinstance(method, Method):
        told = f"method {name!r}: {method!r} is no Method"
        raise UserError(f"{told}; expected Method(trains, assignment, residual, source)")
    if found := list(method.problems()):
        raise UserError(f"method {name!r}: {'; '.join(found)}")


def _same(one: Method, other: Method) -> bool:
    """Whether they are one, defined again: in a notebook whose cell was run twice."""
    a, b = type(one.assignment), type(other.assignment)
    named = (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    return named and replace(one, assignment=other.assignment) == other


METHODS = Registry("method", GROUP, _OWN, _check, _same)
"""All methods by name: the table above, and what `register_method` and entry points add."""


def register_method(name: str, method: Method) -> None:
    """Makes a method known to recipes of this process.

    Args:
        name: What recipes call it.

    Raises:
        UserError: It lacks a part or contradicts itself, or there is one of that name.

    Example:
        >>> register_method("fedex", Method("both", Average(), "dropped", "mine"))
        Traceback (most recent call last):
        fedex_lora.errors.UserError: method 'fedex': registered twice, by fedex-lora and ...
    """
    assignment = getattr(method, "assignment", None)
    METHODS.register(name, method, type(assignment).__module__)


def get_method(name: str | Method) -> Method:
    """The method of that name; or that one itself, if it is whole.

    Raises:
        UserError: If there is none; the nearest name is suggested. Two packages have one, or it
            cannot be imported.

    Example:
        >>> get_method("fedex").assignment.name
        'average'
    """
    if not isinstance(name, str):
        _check("given", name)
        return name
    if name in METHODS:
        return METHODS.one(name)
    near = did_you_mean(name, METHODS, cutoff=0.0)
    known = ", ".join(METHODS)
    raise RecipeError(f"method.name: there is no method {name!r}{near} Known: {known}")
