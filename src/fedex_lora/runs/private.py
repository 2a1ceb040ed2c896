"""What a private run settles before round 1, and what its records say of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.private.begin import notes, plan_of
from fedex_lora.engines.setup import Federation
from fedex_lora.federation.record import Record
from fedex_lora.runs import by_client
from fedex_lora.runs.spent import NOT_PRIVATE
from fedex_lora.runs.watch import Watcher


def settle(federation: Federation, watcher: Watcher, elsewhere: bool = False) -> Federation:
    """The federation with as many rounds as the privacy budget allows; what is settled is said.

    Args:
        elsewhere: Whether clients are on other machines.

    Raises:
        UserError: Not one round fits, or no account can be given of some client's rows.
    """
    if federation.recipe.privacy.client_level is not None:
        return by_client.settle(federation, watcher)
    examples = federation.examples
    plan = plan_of(federation.recipe, federation.settings, examples, elsewhere)
    if plan is None:
        return federation
    for note in notes(federation.recipe, plan, list(examples)):
        watcher.note(note)
    return replace(federation, settings=replace(federation.settings, rounds=plan.rounds))


def take_up(engine: Engine, records: Sequence[Record]) -> None:
    """Goes on with the accounts of the last record, in a run that is resumed."""
    account = _account(engine)
    if account is None or not records or "privacy" not in records[-1]:
        return
    from fedex_lora.engines.private.account import from_json  # noqa: PLC0415

    spent = records[-1]["privacy"]["steps"]
    account.spent = {client: from_json(steps) for client, steps in spent.items()}


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
    found["private"] = NOT_PRIVATE if recipe.privacy.rehearsal else True
    if (account := _account(engine)) is not None:
        from fedex_lora.engines.private.account import as_json  # noqa: PLC0415

        found["epsilon"] = {client: account.told(client) for client in sorted(account.spent)}
        found["steps"] = {client: as_json(account.spent[client]) for client in found["epsilon"]}
        return found
    before = records[-1]["privacy"]["epsilon"] if records else {}
    now = {c: m["epsilon"] for c, m in record["clients"].items() if "epsilon" in m}
    return {**found, "epsilon": dict(sorted({**before, **now}.items()))}


def _account(engine: Engine) -> Any:
    """The accounts of clients that train in this process."""
    return getattr(getattr(engine, "train_with", None), "account", None)
