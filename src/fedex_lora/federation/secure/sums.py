"""What clients add up in a round, so that the next state follows from sums alone.

With drifts D = B − B⁰ and E = A − A⁰ a method needs Σ wD and Σ wE, or a sum over products

    covariance  Σ wᵢ·DᵢEᵢ                    (its residual is that minus D̄Ē)
    increment   Σ wᵢ·(BᵢAᵢ − Bᵢ⁰Aᵢ⁰)
    product     Σ wᵢ·(Bᵢ⁰Aᵢ⁰ + η(BᵢAᵢ − Bᵢ⁰Aᵢ⁰))    where each starts from factors of its own

of which no product is formed: two sketches with public random Ω and Ψ are sums too, and give it
back (generalised Nyström: Nakatsukasa, arXiv 2009.11392),

    Y = Σ wᵢ·Pᵢ Ω  (out × p),    Z = Σ wᵢ·Ψ Pᵢ  (q × in),    P = Q (Ψ Q)⁺ Z,   Q = orth(Y),

exactly as soon as p is the rank of P, which is at most the sum of the clients' ranks. Where Y and Z
would hold more numbers than P, it is P that is summed. All in float64; B in units of the layer's
scale, factors padded with zeros to the layer's rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.aggregator import Aggregate, concluded
from fedex_lora.aggregation.delta import Delta, concat
from fedex_lora.aggregation.methods import Method
from fedex_lora.aggregation.seeding import derive
from fedex_lora.aggregation.statistics import Statistics, padded
from fedex_lora.errors import ProtocolError
from fedex_lora.federation.checks import OF_ACCOUNTS
from fedex_lora.federation.messages import Tensors, Update, replaced
from fedex_lora.federation.noise import WITHIN, SumNoise
from fedex_lora.federation.settings import Settings

MORE = 8  # rows that Ψ has beyond p
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Summand:
    """What a client adds: weight·tensors.

    Attributes:
        weight: n of the weights.
        told: What the server is told of this client, beside the sums.
        start: Of what it was trained from; see `told.origin`. Empty where that is known already.
    """

    tensors: Tensors
    weight: float
    told: Mapping[str, float] = field(default_factory=dict)
    start: str = ""


def products(method: Method, round: int) -> frozenset[str]:
    """Which sums over products are needed in a round."""
    if method.assignment.sent_up(method.trained(round)) != {"A", "B"}:
        return frozenset()  # D or E is zero, and the product follows from the means
    needs = method.assignment.needs
    if method.assignment.means:  # with the covariance all else follows from them
        return (
            frozenset() if method.averages and not method.in_ledger else frozenset({"covariance"})
        )
    if "product" in needs and not method.assignment.own:
        return needs - {"product"} | {"increment"}  # all start from what the server knows
    return needs


def means(method: Method, round: int) -> frozenset[str]:
    """Of which factors the mean is needed in a round."""
    seen = method.assignment.sent_up(method.trained(round))
    return seen if len(seen) < 2 or method.assignment.means else frozenset()


def widths(settings: Settings, round: int, clients: Iterable[str], begun: bool) -> dict[str, int]:
    """p of each layer: the rank that a sum over these clients' products can have at most.

    Args:
        begun: Whether B⁰ is not zero.
    """
    found: dict[str, int] = {}
    asked = None if settings.secure is None else settings.secure.rank
    if not products(settings.method, round):
        return {}
    for client in clients:
        for name, layer in settings.layers_of(client).items():
            found[name] = found.get(name, 0) + layer.rank
    drifts = settings.method.assignment.means
    for name, layer in settings.layers.items():
        if asked is not None:
            found[name] = asked
        elif begun and not drifts:  # B⁰E, of all clients together
            found[name] += layer.rank
    return found


def is_dense(layer: LayerShape, width: int) -> bool:
    """Whether the sum itself holds no more numbers than its sketches.

    Example:
        >>> layer = LayerShape(out=100, inp=100, rank=4, scale=1.0)
        >>> is_dense(layer, 12), is_dense(layer, 48)
        (False, True)
    """
    return width * layer.out + (width + MORE) * layer.inp >= layer.out * layer.inp


def shapes(settings: Settings, round: int, width: Mapping[str, int], head: Tensors) -> Shapes:
    """What is summed in a round, by name, in the order in which it stands in the vector."""
    method = settings.method
    found: dict[str, tuple[int, ...]] = {"count": (1,), "loss": (2,)}
    for name, layer in settings.layers.items():
        if "A" in means(method, round):
            found[f"A/{name}"] = (layer.rank, layer.inp)
        if "B" in means(method, round):
            found[f"B/{name}"] = (layer.out, layer.rank)
        for kind in sorted(products(method, round)):
            if is_dense(layer, width[name]):
                found[f"{kind}/{name}"] = (layer.out, layer.inp)
            else:
                found[f"{kind} Y/{name}"] = (layer.out, width[name])
                found[f"{kind} Z/{name}"] = (width[name] + MORE, layer.inp)
        if settings.ranks and products(method, round):
            found[f"ranks/{name}"] = (layer.rank,)
    # sorted: a head that was read from a file has another order than one that was trained
    found |= {f"head/{name}": tuple(head[name].shape) for name in sorted(head)}
    return found | ({WITHIN: (1,)} if settings.clip is not None else {})


def summand(
    settings: Settings, width: Mapping[str, int], start: AdapterState, update: Update
) -> Summand:
    """What one client adds, as `shapes` lists it.

    Args:
        width: Of the sketches, as the server gives them.
        start: Where the client started from.

    Raises:
        ProtocolError: The widths do not fit the layers.
    """
    round, end = update.round, replaced(start, update.tensors)
    wanted = settings.layers.keys() if products(settings.method, round) else set()
    if width.keys() != wanted or any(type(w) is not int or w < 1 for w in width.values()):
        raise ProtocolError("asked for sketches that do not fit the layers")
    loss = update.metrics.get("loss", math.nan)
    told = [loss, 1.0] if math.isfinite(loss) else [0.0, 0.0]
    found = {"count": torch.ones(1), "loss": torch.tensor(told)}
    method = settings.method
    for name, layer in settings.layers.items():
        before, after = _wide(start.layers[name], layer), _wide(end.layers[name], layer)
        d, e = after.B - before.B, after.A - before.A
        none = d.new_zeros(())
        if "A" in means(method, round):
            found[f"A/{name}"] = e
        if "B" in means(method, round):
            found[f"B/{name}"] = d
        for kind in sorted(products(method, round)):
            eta = settings.server_learning_rate
            terms = {
                "covariance": [(d, e)],
                "increment": [(d, after.A), (before.B, e)],
                "product": [(after.B * eta, after.A), (before.B * (1 - eta), before.A)],
            }[kind]
            if is_dense(layer, width[name]):
                found[f"{kind}/{name}"] = sum((b @ a for b, a in terms), none)
            else:
                omega, psi = _random(settings, round, name, width[name])
                found[f"{kind} Y/{name}"] = sum((b @ (a @ omega) for b, a in terms), none)
                found[f"{kind} Z/{name}"] = sum(((psi @ b) @ a for b, a in terms), none)
        if settings.ranks and products(method, round):
            rank = start.layers[name].rank
            found[f"ranks/{name}"] = (torch.arange(layer.rank) < rank).double()
    moved = {n: end.head[n].double() - t.double() for n, t in sorted(start.head.items())}
    weight = 1 if settings.weights == "uniform" else update.examples
    told = {name: update.metrics[name] for name in OF_ACCOUNTS if name in update.metrics}
    return Summand(found | {f"head/{n}": t for n, t in moved.items()}, weight, told)


def sized(added: Summand, noise: SumNoise | None) -> Summand:
    """What stands for a summand in the vote for sizes: itself; with noise its bound, as the size of
    what was learned would tell of it."""
    if noise is None:
        return added
    largest = torch.tensor(noise.largest, dtype=torch.float64)
    tensors = {n: largest if is_learned(n) else t for n, t in added.tensors.items()}
    if noise.of_count is not None:
        tensors[WITHIN] = torch.tensor(noise.largest_count, dtype=torch.float64)
    return replace(added, tensors={**tensors, "loss": torch.zeros(2)})


def noised(added: Summand, noise: SumNoise, client: str, round: int) -> Summand:
    """A summand with the client's share of the noise, and without its loss."""
    learned = {name: t for name, t in added.tensors.items() if is_learned(name)}
    tensors = {**added.tensors, **noise.share(learned, client, round), "loss": torch.zeros(2)}
    return replace(added, tensors=tensors)


def is_learned(name: str) -> bool:
    """Whether a summand is the drift of a factor or a head."""
    return name.partition("/")[0] in ("A", "B", "head")


def aggregate(
    settings: Settings,
    round: int,
    width: Mapping[str, int],
    start: AdapterState,
    sums: Mapping[str, Tensor],
    clients: int,
) -> Aggregate:
    """What the sums amount to: the same as what the clients' own numbers would.

    Args:
        start: The shared factors at the full rank, and the head.
        sums: Σ n·x by name.
        clients: How many went into them.
    """
    method, eta = settings.method, settings.server_learning_rate
    mean = {name: total / sums["count"] for name, total in sums.items()}
    head = {n: (t.double() + eta * mean[f"head/{n}"]).to(t) for n, t in start.head.items()}
    layers = (
        (name, _statistics(settings, round, width, mean, clients, name, f))
        for name, f in start.layers.items()
    )
    trained = method.trained(round)
    told = trained != {"A", "B"} or "covariance" in products(method, round)
    return concluded(method, layers, head, told and method.shows_products(trained))


def _statistics(
    settings: Settings,
    round: int,
    width: Mapping[str, int],
    mean: Mapping[str, Tensor],
    clients: int,
    name: str,
    start: Factors,
) -> Statistics:
    """Those of one layer, in float32. A mean that was not summed is NaN, so that an assignment that
    reads it after all comes to nothing that could be trained from."""
    method, layer, eta = settings.method, settings.layers[name], settings.server_learning_rate
    seen, summed = method.assignment.sent_up(method.trained(round)), products(method, round)
    recovered = partial(_recovered, settings, round, width, mean, name)
    first, s = _wide(start, layer), layer.scale
    d, e = (mean.get(f"{x}/{name}", torch.tensor(torch.nan if x in seen else 0.0)) for x in "BA")
    covariance = product = increment = None
    if "covariance" in summed:
        products_of_drifts = recovered("covariance")
        if method.assignment.needs:
            increment = concat([products_of_drifts, Delta(d, first.A), Delta(first.B, e)])
            increment = increment.scaled(eta)
        covariance = products_of_drifts - Delta(d, e)
        if covariance.right is not None:  # the columns that D̄ adds say nothing new
            covariance = covariance.split((clients - 1) * layer.rank)[0]
    if "increment" in summed:
        increment = recovered("increment").scaled(eta)
    elif len(seen) == 1:
        gained = Delta(d, first.A) if "B" in seen else Delta(first.B, e)
        increment = gained.scaled(eta)
    if "product" in summed:
        product = recovered("product")
    elif "product" in method.assignment.needs and increment is not None:
        product = increment
        if first.B.any():
            shares = mean.get(f"ranks/{name}", torch.ones(()))
            product = product + Delta(first.B * shares, first.A)
    return Statistics(
        layer,
        eta,
        seen == {"A", "B"},
        _single(first),
        _single(Factors(first.A + e, first.B + d, s)),
        covariance=_scaled(covariance, s),
        product=_scaled(product, s),
        increment=_scaled(increment, s),
    )


def _recovered(
    settings: Settings,
    round: int,
    width: Mapping[str, int],
    mean: Tensors,
    name: str,
    kind: str,
) -> Delta:
    """P from its sketches: Q (Ψ Q)⁺ Z."""
    if is_dense(settings.layers[name], width[name]):
        return Delta(mean[f"{kind}/{name}"])
    _, psi = _random(settings, round, name, width[name])
    q = torch.linalg.qr(mean[f"{kind} Y/{name}"]).Q
    return Delta(q, torch.linalg.lstsq(psi @ q, mean[f"{kind} Z/{name}"]).solution)


def _random(settings: Settings, round: int, name: str, width: int) -> tuple[Tensor, Tensor]:
    """Ω (in × p) and Ψ (q × out) of one layer in one round: known to everybody."""
    layer, found = settings.layers[name], []
    for what, size in (("Ω", (layer.inp, width)), ("Ψ", (width + MORE, layer.out))):
        seed = derive(settings.seed, "sketch", what, round, name)
        generator = torch.Generator().manual_seed(seed)
        found.append(torch.randn(size, generator=generator, dtype=torch.float64))
    return found[0], found[1]


def _wide(f: Factors, layer: LayerShape) -> Factors:
    full = padded(f, layer)
    return Factors(full.A.double(), full.B.double(), layer.scale)


def _scaled(w: Delta | None, scale: float) -> Delta | None:
    return None if w is None else w.scaled(scale).to(torch.float32)


def _single(f: Factors) -> Factors:
    return Factors(f.A.float(), f.B.float(), f.scale)
