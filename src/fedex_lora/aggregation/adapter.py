"""LoRA adapters as values: the factors of every adapted layer and the trained head.

Orientation and scale are settled before anything gets here: ΔW is out × in and equals
scale · B · A with B (out × r) and A (r × in), whatever the layer's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.seeding import derive
from fedex_lora.aggregation.sparse import sparse_name, spread

Name = TypeVar("Name")


@dataclass(frozen=True)
class LayerShape:
    """Shape of one adapted layer.

    Attributes:
        out: Rows of ΔW.
        inp: Columns of ΔW.
        rank: r of the model as configured; a client's own may differ.
        scale: s at that rank (α/r, or α/√r for rsLoRA), as PEFT applies it.
        rslora: Whether s falls with √r instead of r.
        std: Standard deviation of a fresh A's normal entries: 1/r for PEFT's "gaussian", 1 for
            embeddings, whose input is one-hot, so that `in` says nothing about its size. None:
            uniform in ±1/√in, PEFT's default.
        fixed_rank: Set by a rank pattern; clients' `ranks` do not change it.
    """

    out: int
    inp: int
    rank: int
    scale: float
    rslora: bool = False
    std: float | None = None
    fixed_rank: bool = False

    def at_rank(self, rank: int) -> LayerShape:
        """The same layer for a client whose rank is `rank`; α stays, so s changes."""
        if self.fixed_rank or rank == self.rank:
            return self
        ratio = self.rank / rank
        scale = self.scale * (ratio**0.5 if self.rslora else ratio)
        return replace(self, rank=rank, scale=scale)


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one layer: ΔW = scale · B · A, A (r × in), B (out × r)."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Delta:
        """scale · B · A, the change this adapter makes to its layer."""
        return Delta(self.B * self.scale, self.A)


@dataclass(frozen=True)
class AdapterState:
    """Everything a client trains: factors by layer, and the head by parameter name.

    Attributes:
        variates: SCAFFOLD's, by A/LAYER, B/LAYER and head/PARAMETER, where there are some: c − cᵢ
            of a client that begins, its next cᵢ of one that has ended.
        pair: Of a client that has a pair of its own beside the shared one. The scale of one is the
            part that it has in the client's model, and the shared one has the rest of its own.
    """

    layers: Mapping[str, Factors] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    variates: Mapping[str, Tensor] = field(default_factory=dict)
    pair: Mapping[str, Factors] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Bytes of all tensors in it."""
        tensors = [t for f in [*self.layers.values(), *self.pair.values()] for t in (f.A, f.B)]
        tensors += [*self.head.values(), *self.variates.values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def inner_name(layer: str) -> str:
    """What R of a layer, or its blocks, is called in the head, where that is trained between its A
    and B."""
    return f"{layer}.inner"


def weight_name(layer: str) -> str:
    """What the gradient of a layer's whole weight is called in the head, where one is sent."""
    return f"{layer}.weight"


def whole_inner(inner: Tensor, rank: int) -> Tensor:
    """R (r × r) itself, or of its blocks (heads × p × p), of which the last may be too large.

    Example:
        >>> whole_inner(torch.tensor([[[2.0]], [[3.0]]]), 2).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    return inner if inner.ndim == 2 else torch.block_diag(*inner)[:rank, :rank]


def folded(state: AdapterState) -> AdapterState:
    """The same change with plain factors: B·R in the place of B where the head holds an R, or its
    blocks, and the head's sparse change of a weight beside them; mixed with the client's own pair,
    where it has one.

    Example:
        >>> f = Factors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
        >>> r = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> whole = folded(AdapterState({"q": f}, {"q.inner": r}))
        >>> whole.layers["q"].B[0].tolist(), list(whole.head)
        ([2.0, 3.0], [])
    """
    head = dict(state.head)
    inner = {name: head.pop(inner_name(name), None) for name in state.layers}
    layers = {
        name: f if (r := inner[name]) is None else replace(f, B=f.B @ whole_inner(r, f.rank))
        for name, f in state.layers.items()
    }
    for name, f in layers.items():
        values = head.pop(sparse_name(name), None)
        if values is not None:
            out, inp = len(f.B), f.A.shape[1]
            d = spread(name, out, inp, values) / f.scale
            a, b = torch.cat([f.A, torch.eye(inp).to(f.A)]), torch.cat([f.B, d], dim=1)
            layers[name] = replace(f, A=a, B=b)
    return mixed(AdapterState(layers, head, pair=state.pair))


def mixed(state: AdapterState) -> AdapterState:
    """The shared pair and the client's own as one of both ranks: (s − s*)·BA + s*·B*A*.

    Example:
        >>> shared = Factors(torch.ones(1, 2), torch.ones(3, 1), 2.0)
        >>> own = Factors(torch.ones(1, 2), 5 * torch.ones(3, 1), 0.5)
        >>> both = mixed(AdapterState({"q": shared}, pair={"q": own})).layers["q"]
        >>> both.rank, both.delta().dense()[0, 0].item()
        (2, 4.0)
    """
    layers = dict(state.layers)
    for name, own in state.pair.items():
        f = layers[name]
        b = torch.cat([f.B * (1 - own.scale / f.scale), own.B * (own.scale / f.scale)], dim=1)
        layers[name] = Factors(torch.cat([f.A, own.A]), b, f.scale)
    return AdapterState(layers, state.head)


def uniform(layers: Mapping[Name, Factors]) -> dict[Name, Factors]:
    """The same changes at one rank for all layers, the largest, and at scale 1: padded with zeros.

    Example:
        >>> one = Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)
        >>> two = Factors(torch.ones(2, 3), torch.ones(2, 2), 1.0)
        >>> padded = uniform({"q": one, "v": two})["q"]
        >>> padded.rank, padded.scale, padded.delta().dense()[0].tolist()
        (2, 1.0, [2.0, 2.0, 2.0])
    """
    rank = max((f.rank for f in layers.values()), default=0)
    padded = {}
    for name, f in layers.items():
        more = rank - f.rank
        a = torch.nn.functional.pad(f.A, (0, 0, 0, more))
        b = torch.nn.functional.pad(f.B if f.scale == 1 else f.B * f.scale, (0, more))
        padded[name] = Factors(a, b, 1.0)
    return padded


def fresh(layers: Mapping[str, LayerShape], seed: int, version: int = 0) -> dict[str, Factors]:
    """New factors: A random, a function of (seed, version, layer) alone, and B = 0 (eq. 10).

    A smaller rank gets the first rows of what a larger one gets.

    Args:
        layers: Shapes and scales.
        seed: The run's seed.
        version: The round after which the factors are drawn; 0 for the start.

    Example:
        >>> layer = LayerShape(out=4, inp=3, rank=2, scale=2.0)
        >>> f = fresh({"q": layer}, seed=0)["q"]
        >>> f.A.shape, f.B.abs().sum().item()
        (torch.Size([2, 3]), 0.0)
    """
    return {name: _fresh_layer(s, derive(seed, "A", version, name)) for name, s in layers.items()}


def _fresh_layer(layer: LayerShape, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    # row by row: what a row holds must not depend on how many there are
    rows = [_fresh_row(layer, generator) for _ in range(layer.rank)]
    return Factors(torch.stack(rows), torch.zeros(layer.out, layer.rank), layer.scale)


def _fresh_row(layer: LayerShape, generator: torch.Generator) -> Tensor:
    if layer.std is None:
        return (torch.rand(layer.inp, generator=generator) * 2 - 1) * layer.inp**-0.5
    return torch.randn(layer.inp, generator=generator) * layer.std
