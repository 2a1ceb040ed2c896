"""Closing a round: the updates that came back, checked and aggregated by the run's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.setup import Federation, set_up_server
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import ProtocolError, UserError
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Lost, Scores, Update
from fedex_lora.federation.settings import Settings
from fedex_lora.recipe import Recipe
from fedex_lora.runs.by_hand.folder import SCORES, Scored
from fedex_lora.runs.by_hand.opening import names_of
from fedex_lora.runs.by_hand.update import Back, Waiting, read_back
from fedex_lora.runs.here import Assemble, stage_of
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import BY_HAND, RunDir
from fedex_lora.runs.watch import Silent, Watcher


class Carried:
    """A transport whose updates were carried here. With an update comes how good the client finds
    the model that it started from: that of the round before."""

    scores_later = True

    def __init__(
        self, addresses: Sequence[str], waiting: Waiting, settings: Settings, stage: Stage
    ) -> None:
        self.addresses, self.waiting = addresses, waiting
        self.settings, self.stage = settings, stage
        self.examples: Mapping[str, int] = {}  # what updates say is taken
        self.validation = dict.fromkeys(settings.clients, 0)
        self._told: dict[str, tuple[str, Scored | None]] | None = None  # address, scores; by client

    def newcomers(self) -> list[str]:
        return []

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        """All updates; who sent none is lost."""
        found = self._checked(exchange)
        for client in exchange.clients:
            update = self._read(found[client][0], exchange).update if client in found else None
            yield update or Lost(client, "no update was given")

    def evaluate(self, exchange: Exchange) -> Iterator[Scores | Lost]:
        """What the updates say of the model that they started from; the last one is fetched by
        whoever wants it."""
        found = {} if exchange.final else self._checked(exchange)
        for client in () if exchange.final else exchange.clients:
            _, scored = found.get(client, ("", None))
            if scored is not None:
                self.validation[client] = scored.rows
                yield Scores(client, scored.scores)
            else:
                lacking = f"its update holds no {SCORES}" if client in found else "none were given"
                yield Lost(client, lacking)

    def _checked(self, exchange: Exchange) -> Mapping[str, tuple[str, Scored | None]]:
        """By client, where its update lies and its scores, if there is nothing wrong with any.

        Raises:
            UserError: All that is wrong, a line for each address.
        """
        if self._told is not None:
            return self._told
        found: dict[str, tuple[str, Scored | None]] = {}
        problems = []
        counts = {}
        for address in self.addresses:
            try:
                back = self._read(address, exchange)
            except UserError as error:
                text = str(error)
                problems.append(text if text.startswith(address) else f"{address}: {text}")
                continue
            client = back.client
            if client in found:
                problems.append(
                    f"{address}: {client}'s, as {found[client][0]} is; give one of them"
                )
            found.setdefault(client, (address, back.scored))
            if back.update is not None:
                counts[client] = back.update.examples
        if problems:
            raise ProtocolError(
                "\n".join(problems) + f"\nRound {exchange.round} stays open, and nothing is changed"
            )
        if counts:
            check_shares(replace(exchange.settings, examples=counts))
        self._told = found
        return found

    def _read(self, address: str, exchange: Exchange) -> Back:
        stage = self.stage
        return read_back(address, self.waiting, exchange, stage.model, stage.task)


def by_hand(addresses: Sequence[str] = (), examples: Mapping[str, int] | None = None) -> Assemble:
    """Runs whose updates lie at these addresses."""

    def assemble(
        recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
    ) -> tuple[Federation, Engine]:
        federation = set_up_server(recipe, clients or names_of(recipe))
        known = RunDir(out).read_json(BY_HAND) or {"run": "", "opened": {}}
        waiting = Waiting(known["run"], known["opened"], examples or {})
        stage = stage_of(federation, out)
        return federation, Carried(addresses, waiting, federation.settings, stage)

    return assemble


def begin_run(recipe: Recipe, out: Path, watcher: Watcher | None = None) -> None:
    """A new run's directory, in which no round is played yet.

    Raises:
        UserError: Its method cannot be carried by hand, or whatever is wrong with the recipe.
    """
    names_of(recipe)
    start_run(recipe, out, watcher, by_hand(), most=0)


def close_round(
    run: Path,
    addresses: Sequence[str],
    examples: Mapping[str, int] | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Aggregates the updates of the round that is open; after the last one the run is finished.
    Where clients score models it is so once they have scored the last one.

    Args:
        addresses: Of turns' folders with `update/` in them, or of updates alone. Of scores alone
            there may be none.
        examples: How many rows were trained on, by client, where updates do not say.

    Returns:
        What results.json says, or nothing while rounds are left.

    Raises:
        UserError: What is wrong with an update, by address; the round stays open.
    """
    directory = RunDir(run)
    recipe = directory.recipe()
    if directory.read_json(BY_HAND) is None:
        raise ProtocolError(f"{run}: no round is open; `fedex-lora round open {run}`")
    if directory.results() is not None:
        raise ProtocolError(
            f"{run}: its last round, {recipe.federation.rounds}, is closed; `fedex-lora resume "
            f"{run} --rounds N` goes on with more rounds"
        )
    state = directory.newest()[0]
    if not addresses and (state is None or state.version < recipe.federation.rounds):
        raise ProtocolError("`updates`: missing; name the folders that came back")
    return resume_run(run, None, watcher or Silent(), by_hand(addresses, examples), most=1)
