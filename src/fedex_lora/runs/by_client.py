"""Client-level differential privacy in a run: clip at the clients, noise on their mean, account.

Under secure aggregation the noise is in the sum already: see `SumNoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.transforms import clip
from fedex_lora.errors import UserError, check_installed
from fedex_lora.federation.noise import (
    SLACK,
    WITHIN,
    MeanNoise,
    count_within,
    next_bound,
    split,
)
from fedex_lora.federation.randomness import Bits, rehearsed, secret
from fedex_lora.federation.record import Record
from fedex_lora.federation.settings import Settings
from fedex_lora.recipe.privacy import ClientLevel
from fedex_lora.runs.spent import NOT_PRIVATE

if TYPE_CHECKING:
    from fedex_lora.engines.private.account import Steps

_TELLING = ("norms", "median_norm", "deviation", "ideal", "left_out")  # of updates without noise
_PLAIN = ("examples", "steps", "seconds")  # of a client: they follow from its number of rows


def settled(
    spec: ClientLevel, rehearsal: bool, settings: Settings, note: Callable[[str], None]
) -> Settings:
    """The settings with as many rounds as the budget allows; `note` is told what is settled.

    Raises:
        UserError: Not one round fits.
    """
    check_installed("dp_accounting", "privacy.client_level")
    from fedex_lora.engines.private.plan import client_rounds  # noqa: PLC0415

    schedule = [settings.sample(round) for round in range(1, settings.rounds + 1)]
    rounds = client_rounds(spec, schedule)
    if rehearsal:
        note(f"{NOT_PRIVATE}, and whoever has the recipe can subtract it")
    else:
        note("a private run does not repeat bit for bit: its noise follows from no seed")
    sees = "the coordinator sees single updates, and is trusted"
    if settings.secure is not None and settings.secure.noise is not None:
        least = settings.secure.noise.least
        more = f"{(settings.sample_size / least) ** 0.5:.3g} times that if all stay"
        sees = f"clients add the noise in shares: what is asked for if {least} stay, {more}"
    note(
        "norms, deviations and training losses are of updates without noise, so none is recorded; "
        + sees
    )
    if rounds < settings.rounds:
        note(
            f"ε = {spec.epsilon:g} allows {rounds} of {settings.rounds} rounds; the run ends with "
            "the last that fits"
        )
    return replace(settings, rounds=rounds)


def begin_round(
    federation: Federation, engine: Engine, round: int, records: Sequence[Record]
) -> tuple[Federation, MeanNoise | None]:
    """Bounds what clients send, and gives the noise on its mean; nothing where that is not asked.

    A client whose update is beyond the bound is refused; no other's norm decides that.
    """
    if federation.recipe.privacy.client_level is None:
        return federation, None
    spec, asked = _spec(federation), federation.settings.sample_size
    bound = _bound(spec, records)
    if spec.epsilon is not None:
        _check_budget(spec, spec.epsilon, _spent(federation, round, records))
    if isinstance(engine, LocalEngine):
        engine.transform = clip(bound)
    told = bound if spec.adaptive else None
    most = bound * (1 + SLACK)
    settings = replace(federation.settings, max_norm=most, norm_ratio=None, clip=told)
    if settings.secure is not None:
        return replace(federation, settings=settings), None
    of_sum = split(spec.noise_multiplier, asked)[0] if spec.adaptive else spec.noise_multiplier
    noise = MeanNoise(bound, of_sum * bound, asked, _bits(federation, "mean", round))
    return replace(federation, settings=settings), noise


def told(federation: Federation, record: Record, records: Sequence[Record]) -> Any:
    """What the record says of the budget; what else tells of single updates is taken out of it.

    A client pays for every round that it is asked in, whether it came or not.
    """
    from fedex_lora.engines.private.account import as_json, epsilon  # noqa: PLC0415

    spec = _spec(federation)
    bound, asked = _bound(spec, records), federation.settings.sample_size
    spent = _spent(federation, record["round"], records)
    found: dict[str, Any] = {"level": "client", "delta": spec.delta, "budget": spec.epsilon}
    found["private"] = NOT_PRIVATE if federation.recipe.privacy.rehearsal else True
    found["epsilon"] = {c: epsilon(spent[c], spec.delta) for c in sorted(spent)}
    found["steps"] = {c: as_json(spent[c]) for c in sorted(spent)}
    found["clip"] = found["next_clip"] = bound
    if spec.adaptive:
        if WITHIN in record:
            within = record.pop(WITHIN)
        else:
            norms = [record["norms"][client] for client in record["clients"]]
            bits = _bits(federation, "count", record["round"])
            within = count_within(norms, bound, split(spec.noise_multiplier, asked)[1], bits)
        found["next_clip"] = next_bound(
            bound, within, asked, spec.quantile, spec.clip_learning_rate
        )
    for key in [key for key in record if key.startswith(_TELLING)]:
        del record[key]
    for client, metrics in record["clients"].items():
        record["clients"][client] = {k: v for k, v in metrics.items() if k in _PLAIN}
    return found


def _check_budget(spec: ClientLevel, budget: float, spent: Mapping[str, tuple[Steps, ...]]) -> None:
    """Rounds within the plan are within the budget, but for those that are played again."""
    from fedex_lora.engines.private.account import epsilon  # noqa: PLC0415

    for client, steps in sorted(spent.items()):
        if (total := epsilon(steps, spec.delta)) > budget:
            raise UserError(
                f"{client}: one more round would bring it to ε = {total:.4g}; the budget is "
                f"{budget:g} at δ = {spec.delta:g} (privacy.client_level.epsilon)"
            )


def _spent(
    federation: Federation, round: int, records: Sequence[Record]
) -> dict[str, tuple[Steps, ...]]:
    """By client, that round included."""
    from fedex_lora.engines.private.account import Steps, added, from_json  # noqa: PLC0415

    before = records[-1]["privacy"]["steps"] if records else {}
    spent = {client: from_json(steps) for client, steps in before.items()}
    for client in federation.settings.sample(round):
        one = Steps(_spec(federation).noise_multiplier, 1.0, 1)
        spent[client] = added(spent.get(client, ()), one)
    return spent


def _spec(federation: Federation) -> ClientLevel:
    spec = federation.recipe.privacy.client_level
    assert spec is not None
    return spec


def _bound(spec: ClientLevel, records: Sequence[Record]) -> float:
    return records[-1]["privacy"]["next_clip"] if records else spec.clip


def _bits(federation: Federation, what: str, round: int) -> Bits:
    if not federation.recipe.privacy.rehearsal:
        return secret
    return rehearsed(derive(federation.recipe.seed, "noise", what, round))
