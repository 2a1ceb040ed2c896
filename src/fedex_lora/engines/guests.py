"""Who takes part in a federation across machines: nodes are greeted, checked, and known by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedex_lora.engines.courier import Courier, Failed, Waits
from fedex_lora.engines.replies import Failure, Hello, about_reply, said, text
from fedex_lora.engines.wire import PROTOCOL, Facts, Identity
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.header import WORDS
from fedex_lora.federation.messages import encode_about
from fedex_lora.federation.settings import Settings

OFTEN = 0.5  # seconds between two looks for replies
SOON = 30.0  # seconds that a client gets at a round's start after its connection broke
_CLOCKS = 30.0  # seconds by which clocks may differ without a note


@dataclass(frozen=True)
class Guest:
    """A client that was greeted and found fit.

    Attributes:
        node: Where it is reached.
        rows: Its training rows.
        validation: Its own validation rows.
        held: The version it said it holds; None once it has shown what it holds.
    """

    node: str
    rows: int
    validation: int
    held: int | None


class Guests:
    """The clients that were found fit, by name.

    Args:
        courier: Carries the messages.
        facts: What clients must have in common with the coordinator.
        identity: Which federation this is.
        waits: How long is waited.
        roster: The only names that are admitted; None for any.
        versions: Of the packages that numbers depend on, here.
        note: Is told what the user should know.
        settings: How much of the weights one client may have.
        declared: Rows by client as they were declared before, in a run that is resumed.

    Attributes:
        declared: Rows by client. They hold for the run: who declares others later is refused.
        began: Whether round 1 has begun. Until then too large a share stops the run, from then on
            it keeps the newcomer out.
    """

    def __init__(
        self,
        courier: Courier,
        facts: Facts,
        identity: Identity,
        waits: Waits,
        roster: frozenset[str] | None = None,
        versions: Mapping[str, str | None] | None = None,
        note: Callable[[str], None] = lambda text: None,
        settings: Settings | None = None,
        declared: Mapping[str, int] | None = None,
    ) -> None:
        self.courier, self.facts, self.identity, self.waits = courier, facts, identity, waits
        self.roster, self.versions, self.note = roster, versions or {}, note
        self.settings, self.declared = settings, dict(declared or {})
        self.began = bool(self.declared)
        self.known: dict[str, Guest] = {}
        self.unfit: dict[str, str] = {}  # by node, why
        self._greeted: dict[str, str] = {}  # by ticket, the node
        self._met: set[str] = set()
        self._present: set[str] = set()  # nodes, when last looked
        self._broke: dict[str, float] = {}  # by node, when

    def gather(self, wanted: int, least: int) -> list[str]:
        """Waits until `wanted` fit clients are there, or at least `least` after the time for it.

        Returns:
            Their names, sorted.

        Raises:
            QuorumLost: Fewer than `least`; the text says who was found unfit, and why.
        """
        began = time.monotonic()
        while len(self.known) < wanted:
            self.greet()
            left = began + self.waits.clients - time.monotonic()
            if len(self.known) >= wanted or (left <= 0 and not self._still_arriving(began)):
                break
            time.sleep(OFTEN)
        if len(self.known) < least:
            reasons = "; ".join(self.unfit.values()) or "nobody else is connected"
            raise QuorumLost(
                f"{len(self.known)} clients are ready after {self.waits.clients:g} s "
                f"(federation.wait_for_clients), federation.min_clients is {least}: {reasons}"
            )
        return sorted(self.known)

    def _still_arriving(self, began: float) -> bool:
        """Who is connected but has not answered yet gets the time of a round's reply."""
        waited = time.monotonic() - began
        return bool(self._greeted) and waited < max(self.waits.clients, self.waits.round)

    def greet(self) -> None:
        """Sends a hello to new nodes and takes in what the earlier ones answered."""
        self._present = set(self.courier.nodes())
        self._met &= self._present  # who comes back is greeted again: it may have been mended
        for node in sorted(self._present):
            if node not in self._met:
                self._met.add(node)
                self._send_hello(node)
        for ticket, reply in self.courier.collect(list(self._greeted)):
            node = self._greeted.pop(ticket)
            if isinstance(reply, Failed):
                self._met.discard(node)  # it may come back
                self.unfit[node] = f"a client did not answer the first message: {reply.reason}"
            else:
                self._meet(node, reply)

    def _send_hello(self, node: str) -> None:
        about = self.say("hello") | {
            "agreed": dict(self.facts.agreed),
            "digests": dict(self.facts.digests),
        }
        ticket = self.courier.send(node, encode_about(about), 0, self.waits.round)
        if isinstance(ticket, Failed):
            self._met.discard(node)
        else:
            self._greeted[ticket] = node

    def _meet(self, node: str, reply: bytes) -> None:
        sender = self.courier.owner(node)
        try:
            about = about_reply(reply, self.identity, sender, WORDS)
            name = about["client"]
            if about.get("kind") == "unfit":
                raise UserError(f"client {name} is not ready: {text(said(Failure, about).reason)}")
            if about.get("kind") != "hello":
                raise UserError(f"client {name} answers with {text(about.get('kind'))[:40]!r}")
            self._check_name(name, node)
            hello = said(Hello, about)
            self._declare(name, hello.rows)
        except (UserError, LookupError, TypeError) as error:
            self.unfit[node] = f"{sender or 'a client'}: {error}"[:1000]
            self.note(str(error)[:1000])
            refused = self.say("refused") | {"reason": str(error)[:1000]}
            self.courier.send(node, encode_about(refused), 0, 60.0)
            return
        self.unfit.pop(node, None)
        self.known[name] = Guest(node, hello.rows, hello.validation, hello.held)
        self._compare(name, hello)

    def _declare(self, name: str, rows: int) -> None:
        """Takes down how many rows a client has: once, for the whole run."""
        before = self.declared.get(name, rows)
        if rows != before:
            raise UserError(
                f"client {name} declared {before} rows before and {rows} now; the number holds for "
                "the run. Give it the rows it began with, or begin a new run"
            )
        declared = {**self.declared, name: rows}
        if self.began and self.settings is not None:
            check_shares(replace(self.settings, examples=declared))
        self.declared = declared

    def _check_name(self, name: str, node: str) -> None:
        before = self.known.get(name)
        if before is not None and before.node != node and before.node in self._present:
            raise UserError(
                f"two clients are called {name}; give each institution a name of its own "
                "(deploy client --name)"
            )
        if self.roster is not None and name not in self.roster:
            known = ", ".join(sorted(self.roster))
            raise UserError(f"client {name} is none of this federation's: {known}")

    def _compare(self, name: str, hello: Hello) -> None:
        """What may differ, but is worth knowing."""
        clock, theirs = hello.time, hello.versions
        apart = abs(time.time() - clock) if isinstance(clock, float) else 0.0
        if apart > _CLOCKS:
            self.note(f"client {name}: its clock is {apart:.0f} s off; set it by a time server")
        mine, theirs = self.versions, theirs if isinstance(theirs, dict) else {}
        other = [f"{p} {text(theirs.get(p))}" for p in mine if mine[p] != theirs.get(p)]
        if other:
            self.note(f"client {name} has {', '.join(other)}; results may differ in the last bits")

    def here(self, name: str) -> Guest | None:
        """The client, if it was connected when nodes were last greeted."""
        guest = self.known.get(name)
        return guest if guest is not None and guest.node in self._present else None

    def why_absent(self, name: str) -> str:
        """Why a client cannot be sent anything."""
        refused = [why for node, why in self.unfit.items() if self.courier.owner(node) == name]
        return refused[0] if refused else "not connected"

    def lost(self, node: str) -> None:
        """A node whose connection broke is greeted again when it is back."""
        self._met.discard(node)
        self._broke[node] = time.monotonic()

    def soon_back(self, name: str) -> bool:
        """Whether its connection broke so lately that it may be back in a moment."""
        guest = self.known.get(name)
        broke = None if guest is None else self._broke.get(guest.node)
        return broke is not None and time.monotonic() - broke < SOON

    def say(self, kind: str) -> dict[str, Any]:
        """What every message begins with."""
        return {
            "protocol": PROTOCOL,
            "kind": kind,
            "federation": self.identity.federation,
            "lineage": [list(part) for part in self.identity.lineage],
        }
