"""What may be aggregated: an update by itself, beside the round's others, and what comes of it.

A client may be broken or hostile. Its numbers are looked at before they become state, so that no
round ends in a state from which the run cannot go on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UpdateRefused, UserError
from fedex_lora.federation.codec import worded
from fedex_lora.federation.messages import VARIATE, Tensors, Update, flat, norm_of, variates_in
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, own_part, sent_part

LARGEST = 1e12  # of an entry: no network uses such weights; sums of their squares are still finite
SEVERAL = 3  # clients from which on one can be compared with the others


def check(update: Update, start: AdapterState, round: int, settings: Settings) -> float:
    """The norm of an update that by itself may be aggregated.

    That is ‖end − start‖ over all that the client trained, factors and head, in float64.

    Raises:
        UpdateRefused: Another round, other layers or shapes, another dtype, a number that is not
            finite, other examples than were declared, a norm above `settings.max_norm`.
    """
    if update.round != round:
        raise UpdateRefused(f"sent an update of round {update.round}; expected round {round}")
    if not update.examples > 0:
        raise UpdateRefused(f"trained on {update.examples} examples; expected at least 1")
    declared = settings.examples.get(update.client, update.examples)
    if update.examples != declared:
        raise UpdateRefused(
            f"trained on {update.examples} examples; it declared {declared} before round 1, and "
            "that holds for the run"
        )
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            raise UpdateRefused(f"its training {name} is {value}; expected a finite number")
    account(update.metrics, settings)
    expected = sent_part(settings, flat(start), round)
    _check_tensors(update.tensors, expected)
    if update.kept and settings.method.exchanges:
        _check_tensors(update.kept, own_part(settings, flat(start)))
    learned = {n: t for n, t in update.tensors.items() if not n.startswith(VARIATE)}
    norm = norm_of(value - expected[name] for name, value in learned.items())
    if settings.max_norm is not None and norm > settings.max_norm + rounding(learned.values()):
        raise UpdateRefused(
            f"it changed by {norm:.4g}; federation.max_norm is {settings.max_norm:g}"
        )
    return norm


OF_ACCOUNTS = ("epsilon", "noise_multiplier")  # of a private training; they follow from its plan


def account(told: Mapping[str, object], settings: Settings) -> dict[str, float]:
    """What a client says of its account; nothing where nothing is counted.

    Raises:
        UpdateRefused: Something is missing or no number, or ε is above the budget, which the
            client's own account would not have let it spend.
    """
    if settings.epsilon is None:
        return {}
    found: dict[str, float] = {}
    for name in OF_ACCOUNTS:
        value, most = told.get(name), settings.epsilon if name == "epsilon" else math.inf
        if type(value) is not float or not (0 <= value <= most and value < math.inf):
            raise UpdateRefused(
                f"its {name} is {str(value)[:40]}; expected a number from 0 to {most:g}"
            )
        found[name] = value
    return found


def variate_norm(update: Update) -> float:
    """The norm of an update's control variates together, which are gradients; 0 if it has none."""
    return norm_of(variates_in(update.tensors).values())


def rounding(ends: Iterable[Tensor]) -> float:
    """By how much float32, which rounds every entry of where a client ended, may have put its
    drift beyond what it was clipped to."""
    return torch.finfo(torch.float32).eps / 2 * norm_of(ends)


def _check_tensors(got: Tensors, expected: Tensors) -> None:
    if got.keys() != expected.keys():
        wrong = sorted(got.keys() ^ expected.keys())[0]
        what = "is missing" if wrong in expected else "was not asked for"
        raise UpdateRefused(f"{worded(wrong)} {what}")
    for name, tensor in got.items():
        like = expected[name]
        if tensor.shape != like.shape:
            shapes = f"shape {tuple(tensor.shape)}; expected {tuple(like.shape)}"
            raise UpdateRefused(f"{worded(name)} has {shapes}")
        if tensor.dtype != like.dtype:
            raise UpdateRefused(f"{worded(name)} has dtype {tensor.dtype}; expected {like.dtype}")
        largest = _magnitude(tensor)
        if not math.isfinite(largest):
            raise UpdateRefused(f"{worded(name)} has entries that are NaN or infinite")
        if largest > LARGEST:
            raise UpdateRefused(
                f"{worded(name)} has entries of {largest:.3g}; at most {LARGEST:g} are taken"
            )


def outliers(
    norms: Mapping[str, float], ratio: float | None, told: str = "it changed by"
) -> dict[str, str]:
    """Clients whose norm is more than `ratio` times the median of the others', and why.

    From three clients on. The median withstands liars as long as they are fewer than half.

    Args:
        told: What the norm is of, for the reason.

    Example:
        >>> list(outliers({"a": 1.0, "b": 2.0, "c": 90.0}, 10.0))
        ['c']
        >>> list(outliers({"a": 1.0, "b": 90.0}, 10.0))
        []
    """
    if ratio is None or len(norms) < SEVERAL:
        return {}
    found = {}
    for client, norm in norms.items():
        median = statistics.median(n for other, n in norms.items() if other != client)
        if 0 < median * ratio < norm:
            found[client] = (
                f"{told} {norm:.4g}, the median of the others is {median:.4g}; "
                f"federation.max_norm_ratio is {ratio:g}"
            )
    return found


def check_shares(settings: Settings) -> None:
    """Raises a `UserError` if one of several clients would all but decide the mean by itself."""
    shares = settings.shares()
    heaviest = max(shares, key=lambda client: shares[client], default="")
    most = settings.max_share
    if most is None or len(shares) < SEVERAL or shares[heaviest] <= most:
        return
    rows = sum(settings.examples.values())
    raise UserError(
        f"client {heaviest} declares {settings.examples[heaviest]:,} of {rows:,} rows, a share of "
        f"{shares[heaviest]:.4g} of the weights; federation.max_share is {most:g}. If the number "
        "is right, set federation.weights: uniform, or raise federation.max_share; else leave "
        "that client out"
    )


def too_large(state: ServerState) -> str | None:
    """The first tensor of the newest version with entries that nobody could train from.

    That is, NaN, infinite or larger than `LARGEST`; None if there is none. Of a factored increment
    r·max|left|·max|right| bounds the entries.
    """
    for name, magnitude in _magnitudes(state):
        if not magnitude <= LARGEST:
            return name
    return None


def _magnitudes(state: ServerState) -> Iterator[tuple[str, float]]:
    for name, f in state.factors.items():
        yield f"A of {name!r}", _magnitude(f.A)
        yield f"B of {name!r}", _magnitude(f.B)
        yield f"B·A of {name!r}", _bound(f.delta())
    for name, value in state.head.items():
        yield f"head of {name!r}", _magnitude(value)
    for name, value in state.variate.items():
        yield f"control variate of {name!r}", _magnitude(value)
    for part in (state.ledger.newest(), state.carry):
        for name, w in part.items():
            yield f"increment of {name!r}", _bound(w)


def _bound(w: Delta) -> float:
    if w.right is None:
        return _magnitude(w.left)
    return w.rank * _magnitude(w.left) * _magnitude(w.right) if w.rank else 0.0


def _magnitude(tensor: Tensor) -> float:
    """The largest |entry|; NaN where there is a NaN."""
    return torch.linalg.vector_norm(tensor, math.inf).item() if tensor.numel() else 0.0
