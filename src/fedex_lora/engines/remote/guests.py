"""Who takes part in a federation across machines: nodes are greeted, checked, and known by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedex_lora.engines.remote.audit import Audit
from fedex_lora.engines.remote.courier import Courier, Failed, Waits
from fedex_lora.engines.remote.replies import Failure, Hello, about_reply, said, text
from fedex_lora.engines.remote.wire import PROTOCOL, Facts, Identity
from fedex_lora.errors import MOST, QuorumLost, UserError, some
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.codec import encode_about
from fedex_lora.federation.header import WORDS
from fedex_lora.federation.settings import Settings

OFTEN = 0.5  # seconds between two looks for replies
SOON = 30.0  # seconds that a client gets at a round's start after its connection broke
AGAIN = 10.0  # seconds until a client whose operator has yet to speak is greeted again
PATIENT = 5.0  # seconds that are waited without a word
_REMIND = 60.0  # seconds until it is said again for whom is waited
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
        audit: Of every message.

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
        audit: Audit = Audit(),  # noqa: B008
    ) -> None:
        self.courier, self.facts, self.identity, self.waits = courier, facts, identity, waits
        self.roster, self.versions, self.note = roster, versions or {}, note
        self.settings, self.declared = settings, dict(declared or {})
        self.audit = audit
        self.began = bool(self.declared)
        self.known: dict[str, Guest] = {}
        self.unfit: dict[str, str] = {}  # by node, why
        self._greeted: dict[str, str] = {}  # by ticket, the node
        self._met: set[str] = set()
        self._present: set[str] = set()  # nodes, when last looked
        self._broke: dict[str, float] = {}  # by node, when
        self._undecided: dict[str, float] = {}  # by node, when it is greeted again

    def gather(self, wanted: int, least: int) -> list[str]:
        """Waits until `wanted` fit clients are there, or at least `least` after the time for it.

        Returns:
            Their names, sorted.

        Raises:
            QuorumLost: Fewer than `least`; the text says who was found unfit, and why.
        """
        began = time.monotonic()
        waiting = _Waiting(self, wanted, began)
        while len(self.known) < wanted:
            self.greet()
            waiting.tell()
            left = began + self.waits.clients - time.monotonic()
            if len(self.known) >= wanted or (left <= 0 and not self._still_arriving(began)):
                break
            time.sleep(OFTEN)
        if len(self.known) < least:
            reasons = "; ".join([*self.unfit.values()][:MOST]) or "nobody else is connected"
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
        for node, when in list(self._undecided.items()):
            if time.monotonic() >= when:
                del self._undecided[node]
                self._met.discard(node)
        for node in sorted(self._present):
            if node not in self._met:
                self._met.add(node)
                self._send_hello(node)
        for ticket, reply in self.courier.collect(list(self._greeted)):
            node = self._greeted.pop(ticket)
            if isinstance(reply, Failed):
                self._met.discard(node)  # it may come back
                self.unfit[node] = f"a client did not answer the first message: {reply.reason}"
                self.received(None, 0, b"", reply.reason, self._peer(node))
            else:
                self._meet(node, reply)
                self.received("hello", 0, reply, self.unfit.get(node, "admitted"), self._peer(node))

    def _send_hello(self, node: str) -> None:
        about = self.say("hello") | {
            "agreed": dict(self.facts.agreed),
            "digests": dict(self.facts.digests),
        }
        blob = encode_about(about)
        ticket = self.courier.send(node, blob, 0, self.waits.round)
        self.sent("hello", 0, blob, ticket, self._peer(node))
        if isinstance(ticket, Failed):
            self._met.discard(node)
        else:
            self._greeted[ticket] = node

    def _meet(self, node: str, reply: bytes) -> None:
        sender = self.courier.owner(node)
        try:
            about = about_reply(reply, self.identity, sender, WORDS)
            name = about["client"]
            if about.get("kind") == "undecided":
                why = text(said(Failure, about).reason)[:300]
                self._await_word(node, f"client {name}: {why}")
                return
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
            blob = encode_about(self.say("refused") | {"reason": str(error)[:1000]})
            self.sent("refused", 0, blob, self.courier.send(node, blob, 0, 60.0), self._peer(node))
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

    def _await_word(self, node: str, why: str) -> None:
        """Its operator has yet to say whether it takes part: it is asked again."""
        if self.unfit.get(node) != why:
            self.unfit[node] = why
            self.note(why)
        self._undecided[node] = time.monotonic() + AGAIN

    def _check_name(self, name: str, node: str) -> None:
        before = self.known.get(name)
        if before is not None and before.node != node and before.node in self._present:
            raise UserError(
                f"two clients are called {name}; give each institution a name of its own "
                "(`name` of `fedex-lora deploy client`)"
            )
        if self.roster is not None and name not in self.roster:
            known = some(sorted(self.roster))
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

    def _peer(self, node: str) -> str:
        """Whose node it is, for the audit log."""
        return self.courier.owner(node) or f"node {node}"

    def sent(self, kind: str, round: int, blob: bytes, ticket: str | Failed, peer: str) -> None:
        """A message that was sent, or not, into the audit log."""
        outcome = f"not sent: {ticket.reason}" if isinstance(ticket, Failed) else "sent"
        self.audit.write("out", kind, self.identity.federation, round, blob, outcome, peer)

    def received(self, kind: object, round: int, blob: bytes, outcome: str, peer: str) -> None:
        """A reply, and what became of it, into the audit log."""
        self.audit.write("in", kind, self.identity.federation, round, blob, outcome, peer)

    def say(self, kind: str) -> dict[str, Any]:
        """What every message begins with."""
        return {
            "protocol": PROTOCOL,
            "kind": kind,
            "federation": self.identity.federation,
            "lineage": [list(part) for part in self.identity.lineage],
        }


class _Waiting:
    """Says for whom is waited and until when: after a moment, when that changes, and now and then.

    Args:
        guests: Who is there.
        wanted: How many are waited for.
        began: When the wait began.
    """

    def __init__(self, guests: Guests, wanted: int, began: float) -> None:
        self.guests, self.wanted, self.began = guests, wanted, began
        self.until = time.time() + guests.waits.clients
        self.told, self.when = "", 0.0

    def tell(self) -> None:
        now, text = time.monotonic(), self.text()
        if now - self.began >= PATIENT and (text != self.told or now - self.when >= _REMIND):
            if len(self.guests.known) < self.wanted:
                self.guests.note(text)
            self.told, self.when = text, now

    def text(self) -> str:
        """Such as "2 of 3 ready, waiting for c until 18:52"."""
        guests, known = self.guests, self.guests.known
        missing = sorted((guests.roster or frozenset()) - known.keys())
        who = some(missing) if missing else f"{self.wanted - len(known)} more"
        until = time.strftime("%H:%M", time.localtime(self.until))
        text = f"{len(known)} of {self.wanted} ready, waiting for {who} until {until}"
        if guests.unfit:
            text += "; not ready: " + "; ".join([*guests.unfit.values()][:MOST])
        return text
