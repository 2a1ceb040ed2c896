"""Clients on other machines, without machines: real messages in bytes, handled in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.site import Institution, bring_to_life, handle
from fedex_lora.engines.setup import Federation, set_up_client
from fedex_lora.federation.header import Limit, first_of
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Lost, Update
from fedex_lora.recipe import DataSpec, Recipe
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.rundir import versions

ANY = Limit(1 << 24, 1 << 30)  # of messages that tests look at
Assembled = tuple[Federation, Engine]
Change = Callable[[str, bytes], bytes | Failed]


def institution(
    recipe: Recipe, name: str, file: Path | None, cache: Path, account: Any = None
) -> Institution:
    return bring_to_life(set_up_client(recipe, name, file), name, cache, versions(), account)


def institutions(recipe: Recipe, cache: Path) -> dict[str, Institution]:
    """One for each file of the recipe, each with a model of its own."""
    files = recipe.data.files()
    return {name: institution(recipe, name, file, cache) for name, (file,) in files}


class InProcess:
    """A courier whose nodes are institutions in this process.

    Args:
        absent: By node, the rounds in which it is not connected.
        change: Makes of every reply what arrives: (node, reply) → reply.
        keys: Whether nodes are known by keys, so that the courier knows whose they are.
    """

    def __init__(
        self,
        nodes: dict[str, Institution],
        absent: dict[str, Sequence[int]] | None = None,
        change: Change = lambda node, reply: reply,
        keys: bool = True,
    ) -> None:
        self.institutions, self.absent, self.change = nodes, absent or {}, change
        self.keys, self.round = keys, 0
        self.down: dict[tuple[int, str], int] = {}
        self.up: dict[tuple[int, str], int] = {}
        self.sent: list[tuple[int, str]] = []
        self._replies: dict[str, tuple[str, bytes | Failed]] = {}

    def nodes(self) -> list[str]:
        here = [n for n in self.institutions if self.round not in self.absent.get(n, ())]
        return sorted(here, reverse=True)

    def owner(self, node: str) -> str | None:
        return self.institutions[node].name if self.keys else None

    def bound(self, most: int) -> None: ...

    def send(self, node: str, blob: bytes, round: int, seconds: float) -> str:
        ticket = str(len(self.sent))
        self.sent.append((round, node))
        self.down[round, node] = self.down.get((round, node), 0) + len(blob)
        reply = self.change(node, handle(blob, self.institutions[node]))
        if isinstance(reply, Failed):
            self.up[round, node] = 0
        elif first_of(blob)["about"]["kind"] == "round":
            self.up[round, node] = len(reply)
        self._replies[ticket] = (node, reply)
        return ticket

    def collect(self, tickets: Sequence[str]) -> list[tuple[str, bytes | Failed]]:
        found = [(t, self._replies.pop(t)[1]) for t in tickets if t in self._replies]
        return found[::-1]


def remote(recipe: Recipe, **federation: object) -> Recipe:
    """The same run across machines; `federation` overrides keys of that block."""
    raw = recipe.model_dump()
    raw["engine"]["kind"] = "flower"
    raw["federation"].pop("partition")
    raw["federation"] |= {"wait_for_clients": 5.0, "round_timeout": 60.0, **federation}
    return Recipe.model_validate(raw)


def without_files(recipe: Recipe, path: Path | None = None) -> Recipe:
    """The coordinator's recipe: the clients' files are not there."""
    names = [name for name, _ in recipe.data.files()]
    raw = recipe.model_dump()
    raw["federation"]["names"] = names
    data = DataSpec(clients=None, path=path or Path("/nowhere")).model_dump()
    raw["data"] = {**data, "train_examples": recipe.data.train_examples}
    return Recipe.model_validate(raw)


def without(gone: Mapping[int, Collection[str]]) -> Callable[..., Assembled]:
    """Assembles a local run in which clients are missing, by round: what a run with failures must
    come to."""

    def assemble(*arguments: Any) -> Assembled:
        federation, engine = in_this_process(*arguments)
        train = engine.train

        def missing(exchange: Exchange) -> Iterator[Update | Lost]:
            absent = gone.get(exchange.round, ())
            there = [client for client in exchange.clients if client not in absent]
            yield from train(Exchange(exchange.state, exchange.settings, there))
            yield from (Lost(client, "missing in the other run too") for client in absent)

        engine.train = missing  # type: ignore[method-assign]
        return federation, engine

    return assemble
