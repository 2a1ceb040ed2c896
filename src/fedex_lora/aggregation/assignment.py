"""Which factors the clients get next: the assignment.

The ideal next global model G' is the same for every method. Methods differ in what of it the
factors of the next round express, and in who holds those factors. An assignment says both; the
aggregator takes its sums, the state its factors, the messages what is sent, and the checks of a
recipe what may be combined, from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.adapter import Factors, LayerShape
    from fedex_lora.aggregation.delta import Delta
    from fedex_lora.aggregation.pruning import Pruning
    from fedex_lora.aggregation.statistics import Statistics

BOTH = frozenset("AB")
NONE: frozenset[str] = frozenset()
OWN_PAIR = frozenset({"pair"})  # a pair beside A and B
SUMS = frozenset({"product", "increment"})
KNOWN = SUMS | {"ends"}


@dataclass(frozen=True)
class Assigned:
    """What one layer's clients get next.

    Attributes:
        factors: At the layer's full rank; a client of a lower rank gets the first of them. None
            where no factor comes from the server.
        left_out: The residual: what of G' − base the factors do not express. None if nothing is
            left, or nobody asks.
        inner: What lies between B and A from now on, if it is new; it goes into the head. R
            (r × r), or the blocks of a block-diagonal one (heads × p × p), which is cut to r × r.
        sparse: Before round 1: values of a sparse change of the whole weight; into the head too.
    """

    factors: Factors | None
    left_out: Delta | None = None
    inner: Tensor | None = None
    sparse: Tensor | None = None


@dataclass(frozen=True)
class Assignment(ABC):
    """Base of all assignments; a subclass states its facts as class attributes.

    Fields of the dataclass, if it has some, are its options: `method.options` of a recipe.

    Attributes:
        name: In tables.
        shared: Factors that the server gives to all clients alike.
        own: Factors of which each client has its own, which are its state while it is away: of "A"
            and "B", or a "pair" beside them, which is private.
        drawn: Whether all factors follow from the seed: A at random, B = 0, and nothing is sent.
        needs: What `assign` reads beside the means. Sums over the clients' products BᵢAᵢ:
            "product", Σ wᵢsᵢBᵢAᵢ, or "increment", Σ wᵢsᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰). Or "ends", every
            client's factors by themselves, for which memory grows with the clients.
        means: Whether `assign` reads the means of the factors, where clients send both. Those that
            read none are summed without showing any under secure aggregation.
        dealt: Whether own factors are given by the server; otherwise a client keeps what it
            trained.
        private: Whether own factors never leave their client, which needs no sum of them.
        head_private: Whether the head stays with its client too, so that nothing is exchanged.
        ranks_may_differ: Whether clients may have different LoRA ranks.
        gradients: Whether `assign` makes the factors of round 1 of a gradient: clients send those
            of the adapted layers' whole weights in that round.
        sketched: Whether it takes its sums over products from sketches, which may lose something;
            they may do so under secure aggregation too.
    """

    name: ClassVar[str] = ""
    shared: ClassVar[frozenset[str]] = BOTH
    own: ClassVar[frozenset[str]] = NONE
    drawn: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    means: ClassVar[bool] = True
    dealt: ClassVar[bool] = False
    private: ClassVar[bool] = False
    head_private: ClassVar[bool] = False
    ranks_may_differ: ClassVar[bool] = False
    gradients: ClassVar[bool] = False
    sketched: ClassVar[bool] = False

    def misfits(self, rank: int) -> Iterator[str]:
        """Which options ask for more than LoRA's rank gives, and why."""
        yield from ()

    def first(self, layer: LayerShape, factors: Factors, seed: int) -> Assigned:
        """What clients start round 1 from.

        Args:
            factors: A at random and B = 0, or those of an adapter to start from.
            seed: The layer's own, for what else is drawn.
        """
        return Assigned(factors)

    def sparse(self, round: int) -> bool:
        """Whether clients train a sparse change of the whole weights in a round, and no factors."""
        return False

    def condensed(self, layer: LayerShape, change: Tensor) -> Factors:
        """The factors that take the place of that change (out × in) after the last such round."""
        raise NotImplementedError

    def pair(self, layers: Mapping[str, LayerShape], seed: int) -> Mapping[str, Factors]:
        """The pair of its own that a client begins with, by layer, where `own` has one.

        Its scale is λs for a layer's scale s: its part in the client's model, of which the shared
        pair is the rest, (1 − λ)s.
        """
        return {}

    @property
    def pruning(self) -> Pruning | None:
        """How clients' ranks shrink, if they do."""
        return None

    @abstractmethod
    def assign(self, s: Statistics) -> Assigned:
        """The factors of one layer, from what the clients' factors amount to."""

    def sent_up(self, trained: frozenset[str]) -> frozenset[str]:
        """Of the factors that clients trained, those that they send."""
        return trained - self.own if self.private else trained

    def sent_down(self, trained: frozenset[str]) -> frozenset[str]:
        """Factors that are new for all clients after a round in which `trained` were trained."""
        return trained & self.shared

    def problems(self) -> Iterator[str]:
        """What contradicts itself, or is missing."""
        for field, known in (("shared", BOTH), ("own", BOTH | OWN_PAIR), ("needs", KNOWN)):
            value = getattr(self, field)
            if not isinstance(value, Set) or not value <= known:
                yield f"{field} is {value!r}; expected a set of {' and '.join(sorted(known))}"
                return
        if not (self.name and isinstance(self.name, str)):
            yield "its `name` is missing; tables show it"
        for x in sorted(BOTH):
            if x in self.shared and x in self.own:
                yield f"{x} is both shared and own; each factor is one of them"
            if x not in self.shared and x not in self.own:
                yield f"{x} is neither shared nor own; each factor is one of them"
        if self.drawn and self.own:
            yield "factors that are drawn from the seed are no client's own"
        for field in ("dealt", "private"):
            if getattr(self, field) and not self.own:
                yield f"{field} is about own factors, and there are none"
        if "pair" in self.own and not self.private:
            yield "a pair beside the shared factors is private"
        plain = type(self)
        if "pair" in self.own and plain.pair is Assignment.pair:
            yield "`pair` is missing: what a client's own pair begins with"
        if plain.sparse is not Assignment.sparse and plain.condensed is Assignment.condensed:
            yield "`condensed` is missing: the factors that follow sparse rounds"
        if self.dealt and self.private:
            yield "own factors that the server deals out are not private"
        if self.head_private and not (self.private and self.own == BOTH):
            yield "head_private is for clients that exchange nothing: private, and own both factors"
        if self.private and self.needs:
            yield f"needs the {' and '.join(sorted(self.needs))} of factors that are private"
        for trained in map(frozenset, chain(combinations("AB", 1), combinations("AB", 2))):
            if not self.sent_up(trained) <= trained - (self.own if self.private else NONE):
                yield f"sent_up is more than what is trained of {_named(trained)} and not private"
            if not self.sent_down(trained) <= self.shared:
                yield f"sent_down, where {_named(trained)} is trained, is more than is shared"


def _named(factors: Set[str]) -> str:
    return " and ".join(sorted(factors))


@dataclass(frozen=True)
class Average(Assignment):
    """B' = B⁰ + η(B̄ − B⁰), A' likewise; the residual is their covariance (eq. 5-16)."""

    name = "average"

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(s.moved, s.averages_miss)


@dataclass(frozen=True)
class Reinit(Assignment):
    """A fresh from the seed, B = 0: all of G' − base is left out, and goes into the base."""

    name = "reinit"
    drawn = True
    needs = frozenset({"product"})
    means = False
    ranks_may_differ = True

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(None, s.product)

    def sent_down(self, trained: frozenset[str]) -> frozenset[str]:
        return frozenset()


@dataclass(frozen=True)
class Keep(Assignment):
    """Each client goes on from its own factors; G moves by the mean of what they changed."""

    name = "keep"
    shared = NONE
    own = BOTH
    needs = frozenset({"increment"})
    means = False
    ranks_may_differ = True

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(None, s.increment)


@dataclass(frozen=True)
class Svd(Assignment):
    """The best pair for the mean product Σ wᵢsᵢBᵢAᵢ, cut to each client's rank.

    A' = the top rows of Vᵀ, completed to orthonormal rows; B' = UΣ/s.
    """

    name = "svd"
    needs = frozenset({"product"})
    means = False
    ranks_may_differ = True

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(s.best_pair())

    def sent_down(self, trained: frozenset[str]) -> frozenset[str]:
        return BOTH


@dataclass(frozen=True)
class SvdAndRest(Svd):
    """As `Svd`, and what the pair leaves out of the mean product goes into the base: FedMomentum.

        B'A' = the best pair of P = Σ wᵢsᵢBᵢAᵢ,    residual = P − s·B'A'

    The paper draws U and V at random (a randomised SVD) and may drop the residual; here the SVD is
    exact and G stays the weighted mean. It is `OwnSvd` at equal ranks with one base for all.

    Source:
        Yan et al., "FedMomentum", arXiv 2603.08014.
    """

    name = "svd, rest to the base"
    ranks_may_differ = False

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(*s.split_product())


@dataclass(frozen=True)
class OwnSvd(Svd):
    """As `Svd`, dealt out as each client's own: who was absent keeps what it had, and its base
    moves with G."""

    shared = NONE
    own = BOTH
    dealt = True
    needs = frozenset({"product", "increment"})

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(s.best_pair(), s.increment)

    def sent_down(self, trained: frozenset[str]) -> frozenset[str]:
        return frozenset()


@dataclass(frozen=True)
class Alone(Assignment):
    """Every client goes on by itself, factors and head; nothing is exchanged."""

    name = "keep"
    shared = NONE
    own = BOTH
    private = True
    head_private = True

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(None)
