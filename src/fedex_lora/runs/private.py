"""What a private run settles before round 1, and what its records say of the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.private.begin import notes, plan_of
from fedex_lora.engines.setup import Federation
from fedex_lora.errors import StorageError, check_installed
from fedex_lora.federation.record import Record
from fedex_lora.federation.settings import Settings
from fedex_lora.recipe import Recipe
from fedex_lora.runs import by_client, spent
from fedex_lora.runs.watch import Watcher


def settle(federation: Federation, watcher: Watcher, elsewhere: bool = False) -> Federation:
    """The federation with as many rounds as the privacy budget allows; see `settled`."""
    recipe, examples = federation.recipe, federation.examples
    settings = settled(recipe, federation.settings, examples, watcher.note, elsewhere)
    return replace(federation, settings=settings)


def settled(
    recipe: Recipe,
    settings: Settings,
    examples: Mapping[str, int],
    note: Callable[[str], None],
    elsewhere: bool = False,
) -> Settings:
    """The settings with as many rounds as the privacy budget allows.

    Args:
        examples: Numbers of rows by client, as far as they are known.
        note: Is told what is settled.
        elsewhere: Whether clients are on other machines.

    Raises:
        UserError: Not one round fits, or no account can be given of some client's rows.
    """
    if (level := recipe.privacy.client_level) is not None:
        return by_client.settled(level, recipe.privacy.rehearsal, settings, note)
    if recipe.privacy.example_level is None:
        return settings
    check_installed("dp_accounting", "privacy.example_level")
    plan = plan_of(recipe, settings, examples, elsewhere)
    assert plan is not None
    for text in notes(recipe, plan, list(examples)):
        note(text)
    return replace(settings, rounds=plan.rounds)


def with_all_spent(record: Record, written: Sequence[Record]) -> Record:
    """A record to go on from, with the account of the newest one that was written: a round that is
    played again has other noise, so what was spent on it before stays spent. A rehearsal's noise
    is the same again, and costs nothing more.
    """
    newest = max(written, key=lambda r: r["round"], default=record)
    there = newest.get("privacy")
    if there is None or there["private"] is not True or newest["round"] < record["round"]:
        return record
    account = {key: there[key] for key in ("epsilon", "steps") if key in there}
    return {**record, "privacy": {**record["privacy"], **account}}


def check_unspent(written: Sequence[Record], run: Path) -> None:
    """Whether a run of which no checkpoint is left may begin anew.

    Raises:
        UserError: Its records tell of a budget that was spent, which round 1 would count from zero.
    """
    there = [r["privacy"] for r in written if r.get("privacy")]
    if there and there[-1]["private"] is True:
        raise StorageError(
            f"{run}: no checkpoint is whole, and its {len(written)} rounds have spent of the "
            f"privacy budget, {spent.line(there[-1])}; begun anew they would be counted from zero. "
            "Put a checkpoint back, or begin a new run and count both"
        )


def take_up(engine: Engine, records: Sequence[Record]) -> None:
    """Goes on with the accounts of the last record, in a run that is resumed."""
    account = _account(engine)
    if account is None or not records or "privacy" not in records[-1]:
        return
    from fedex_lora.engines.private.account import from_json  # noqa: PLC0415

    steps = records[-1]["privacy"]["steps"]
    account.spent = {client: from_json(some) for client, some in steps.items()}


def told(federation: Federation, engine: Engine, record: Record, records: Sequence[Record]) -> Any:
    """What the record of a round says: ε by client of all that was done so far, and the steps
    [noise multiplier, sampling rate, count] that it comes of. None where nothing is private.

    Clients on other machines keep their own accounts, and tell their ε.

    Args:
        records: Of the rounds before.
    """
    recipe = federation.recipe
    if recipe.privacy.client_level is not None:
        return by_client.told(federation, record, records)
    spec = recipe.privacy.example_level
    if spec is None:
        return None
    found: dict[str, Any] = {"level": "example", "delta": spec.delta, "budget": spec.epsilon}
    found["max_grad_norm"] = spec.max_grad_norm
    found["private"] = spent.NOT_PRIVATE if recipe.privacy.rehearsal else True
    if (account := _account(engine)) is not None:
        from fedex_lora.engines.private.account import as_json  # noqa: PLC0415

        found["epsilon"] = {client: account.told(client) for client in sorted(account.spent)}
        found["steps"] = {client: as_json(account.spent[client]) for client in found["epsilon"]}
        return found
    before = records[-1]["privacy"]["epsilon"] if records else {}
    now = {c: m["epsilon"] for c, m in record["clients"].items() if "epsilon" in m}
    # what was spent stays spent, also if a client forgot it
    most = {c: max(before.get(c, 0.0), now.get(c, 0.0)) for c in sorted({*before, *now})}
    return {**found, "epsilon": most}


def _account(engine: Engine) -> Any:
    """The accounts of clients that train in this process."""
    return getattr(getattr(engine, "train_with", None), "account", None)
