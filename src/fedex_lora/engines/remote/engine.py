"""The coordinator's side of a round across machines: sends, collects, waits, gives up.

It knows nothing of how messages travel; a `Courier` carries them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.guests import Guests
from fedex_lora.engines.remote.replies import (
    Failure,
    Lacking,
    Scored,
    about_reply,
    check_metrics,
    check_scores,
    said,
    text,
)
from fedex_lora.engines.remote.wire import Identity, agreement, own_round
from fedex_lora.errors import UserError, some
from fedex_lora.federation.loop import Lost
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    broadcast_nbytes,
    decode_update,
    encode_broadcast,
    most_up,
)
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, broadcast_to, start_of

OFTEN = 0.5  # seconds between two looks for replies
_UNUSABLE = (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass
class _Sent:
    """A message under way."""

    client: str
    node: str
    expires: float
    nbytes: int
    again: bool = False


@dataclass
class _Exchange:
    """One round's (or the last model's) messages and what came of them."""

    state: ServerState
    broadcasts: Mapping[str, Broadcast]
    final: bool
    evaluate: bool
    under_way: dict[str, _Sent] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)  # by client, why nothing was sent
    counted: dict[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)
    good: int = 0
    told: int = -1


class _Patience:
    """Waits for so many seconds from the first moment that something is lacking."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None

    def holds(self, lacking: bool) -> bool:
        now = time.monotonic()
        if lacking and self.since is None:
            self.since = now
        return lacking and now - (self.since or now) <= self.seconds


class RemoteEngine:
    """A transport to clients on other machines.

    Args:
        guests: Who is there.
        settings: The federation's; its clients are those of the roster.
        server: The coordinator's own model.
        evaluate_every: Clients score the model after every so many rounds; 0 for never.
        progress: Is told (round, what for, replies so far, replies in all).
        remember: Keeps the identity and the declared rows, before a round's messages are sent.
    """

    def __init__(
        self,
        guests: Guests,
        settings: Settings,
        server: LocalEngine,
        evaluate_every: int = 0,
        progress: Callable[[int, str, int, int], None] | None = None,
        remember: Callable[[Identity, Mapping[str, int]], None] = lambda identity, rows: None,
    ) -> None:
        self.guests, self.settings, self.server = guests, settings, server
        self.courier, self.waits, self.note = guests.courier, guests.waits, guests.note
        self.evaluate_every, self.progress = evaluate_every, progress
        self._remember = remember
        self._late: dict[str, _Sent] = {}
        self._agreement = agreement(guests.facts.agreed)

    @property
    def validation(self) -> dict[str, int]:
        """Numbers of validation rows by client."""
        return {name: guest.validation for name, guest in self.guests.known.items()}

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of training rows by client, as declared."""
        return dict(sorted(self.guests.declared.items()))

    def newcomers(self) -> list[str]:
        """Clients greeted since the roster was made."""
        self.guests.greet()
        return sorted(set(self.guests.known) - set(self.settings.clients))

    def client_scores(self, state: ServerState, clients: Sequence[str]) -> None:
        """They come with the next round's updates."""
        return None

    def exchange(
        self, state: ServerState, broadcasts: Mapping[str, Broadcast]
    ) -> Iterator[Update | Lost]:
        """Sends to all, and yields what comes, until all have answered or are given up."""
        every = self.evaluate_every
        evaluate = bool(every and state.version and state.version % every == 0)
        self._remember(self.guests.identity, self.examples)
        starts = (start_of(state, self.settings, client) for client in broadcasts)
        self.courier.bound(max(most_up(start).whole for start in starts))
        run = _Exchange(state, broadcasts, False, evaluate)
        for reply in self._replies(run):
            if isinstance(reply, Update):
                run.good += 1
            yield reply

    def deliver(self, state: ServerState) -> dict[str, dict[str, float]]:
        """Sends the last model to everybody who is there, and collects their scores of it."""
        self.guests.greet()
        names = [c for c in self.settings.clients if c in self.guests.known]
        messages = {c: broadcast_to(state, self.settings, c) for c in names}
        run = _Exchange(state, messages, True, self.evaluate_every > 0)
        found: dict[str, dict[str, float]] = {}
        for reply in self._replies(run):
            if isinstance(reply, Lost):
                self.note(f"the last model did not reach {reply.client}: {reply.reason}")
            elif reply.scores:
                found[reply.client] = dict(reply.scores)
        return found

    def _replies(self, run: _Exchange) -> Iterator[Update | Lost]:
        needed = 0 if run.final else self.settings.min_clients
        enough = len(run.broadcasts) if run.final else self.settings.sample_size
        patience = _Patience(self.waits.clients)
        for client in run.broadcasts:
            self._offer(run, client)
        while run.under_way or run.waiting:
            lacking = run.good + len(run.under_way) < needed
            if run.waiting and lacking and patience.since is None:
                self._tell_waiting(run, needed)
            if run.waiting and not patience.holds(lacking):
                yield from self._give_up(run)
            if run.waiting:
                self.guests.greet()
                for client in list(run.waiting):
                    self._offer(run, client)
            yield from self._collect(run)
            self._tell(run)
            if run.good >= enough and not run.final:
                for sent in run.under_way.values():
                    yield Lost(sent.client, f"slower than the first {enough} (oversample)")
                self._late |= run.under_way
                return
            if run.under_way or run.waiting:
                time.sleep(OFTEN)

    def _tell(self, run: _Exchange) -> None:
        total = len(run.broadcasts)
        done = total - len(run.under_way) - len(run.waiting)
        if self.progress is not None and done != run.told:
            run.told = done
            self.progress(run.state.version + 1, "replies", done, total)

    def _tell_waiting(self, run: _Exchange, needed: int) -> None:
        why = some([f"{client} ({reason})" for client, reason in run.waiting.items()])
        until = time.strftime("%H:%M", time.localtime(time.time() + self.waits.clients))
        number = run.state.version + 1
        self.note(f"round {number} needs {needed} clients; waiting for {why} until {until}")

    def _give_up(self, run: _Exchange) -> Iterator[Lost]:
        """Of those who wait; who was cut off just before the round may still make it."""
        for client, reason in list(run.waiting.items()):
            if client in run.spent or not self.guests.soon_back(client):
                del run.waiting[client]
                yield self._lost(run, client, reason)

    def _offer(self, run: _Exchange, client: str) -> None:
        """Sends the round's message, if the client is there."""
        guest = self.guests.here(client)
        if guest is None:
            run.waiting[client] = self.guests.why_absent(client)
            return
        held = run.state.held.get(client, 0)
        if client in run.state.held and guest.held is not None:
            held = min(held, guest.held)
        run.waiting.pop(client, None)
        self._send(run, client, held)

    def _send(self, run: _Exchange, client: str, held: int, again: bool = False) -> None:
        """The message for a client that holds version `held`; its bytes are counted here."""
        state, node = run.state, self.guests.known[client].node
        known = state.held.get(client, 0)
        message = run.broadcasts[client]
        if held != known:
            told = replace(state, held={**state.held, client: held})
            message = broadcast_to(told, self.settings, client)
        about = self.guests.say("final" if run.final else "round") | {
            "client": client,
            "recipe": self._agreement,
            "version": state.version,
            "held": held,
            "own": own_round(state, self.settings, client),
            "evaluate": run.evaluate,
        }
        blob = encode_broadcast(message, self.settings.wire_dtype, about)
        ticket = self.courier.send(node, blob, state.version + 1, self.waits.round)
        kind, number = ("final", state.version) if run.final else ("round", state.version + 1)
        self.guests.sent(kind, number, blob, ticket, client)
        if isinstance(ticket, Failed):
            run.waiting[client] = ticket.reason
            return
        run.spent[client] = run.spent.get(client, 0) + len(blob)
        if held == known:
            run.counted[client] = len(blob)
        expires = time.monotonic() + self.waits.round
        run.under_way[ticket] = _Sent(client, node, expires, len(blob), again)

    def _resent(self, run: _Exchange, client: str) -> int:
        """Bytes beyond the broadcast that the round loop counts; negative if nothing was sent."""
        if client not in run.counted:
            message = run.broadcasts[client]
            run.counted[client] = broadcast_nbytes(message, self.settings.wire_dtype)
        return run.spent.get(client, 0) - run.counted[client]

    def _collect(self, run: _Exchange) -> Iterator[Update | Lost]:
        for ticket, reply in self.courier.collect(list(run.under_way)):
            sent = run.under_way.pop(ticket)
            found = self._opened(run, sent, reply)
            self._audit(run, sent, reply, found)
            if found is not None:
                yield found
        now = time.monotonic()
        for ticket, sent in list(run.under_way.items()):
            if now > sent.expires:
                del run.under_way[ticket]
                self._late[ticket] = sent
                seconds = f"{self.waits.round:g} s (federation.round_timeout)"
                yield self._lost(run, sent.client, f"no reply within {seconds}")
        self._drop_late()

    def _drop_late(self) -> None:
        for ticket, reply in self.courier.collect(list(self._late)) if self._late else []:
            sent = self._late.pop(ticket)
            if not isinstance(reply, Failed):
                self.note(f"an update of {sent.client} came too late and was dropped")
                self.guests.received(None, 0, reply, "too late: dropped", sent.client)

    def _audit(
        self, run: _Exchange, sent: _Sent, reply: bytes | Failed, found: Update | Lost | None
    ) -> None:
        """A line on a reply: what was made of it."""
        kind, outcome = "scores" if run.final else "update", "taken"
        if isinstance(reply, Failed):
            kind, outcome, reply = None, reply.reason, b""
        elif found is None:
            kind, outcome = "lacks", "asked once more"
        elif isinstance(found, Lost):
            kind, outcome = None if found.refused else "failed", found.reason
        number = run.state.version + (not run.final)
        self.guests.received(kind, number, reply, outcome, sent.client)

    def _lost(self, run: _Exchange, client: str, reason: str, refused: bool = False) -> Lost:
        return Lost(client, reason, refused, self._resent(run, client))

    def _opened(self, run: _Exchange, sent: _Sent, reply: bytes | Failed) -> Update | Lost | None:
        """What a reply holds; None if the client is asked once more."""
        client = sent.client
        if isinstance(reply, Failed):
            if reply.gone:  # worth waiting for, where there are too few others
                self.guests.lost(sent.node)
                run.waiting[client] = reply.reason
                return None
            return self._lost(run, client, reply.reason)
        try:
            return self._read(run, sent, reply)
        except _UNUSABLE as error:
            return self._lost(run, client, f"sent what cannot be used: {error}"[:500], True)

    def _read(self, run: _Exchange, sent: _Sent, reply: bytes) -> Update | Lost | None:
        client = sent.client
        start = start_of(run.state, self.settings, client)
        about = about_reply(reply, self.guests.identity, client, most_up(start))
        kind = about.get("kind")
        if kind in ("failed", "undecided"):
            return self._lost(run, client, text(said(Failure, about).reason))
        if kind == "lacks" and not sent.again:
            version = said(Lacking, about).version
            if version > run.state.version:
                raise UserError(f"it claims to hold version {version}")
            self.note(f"{client} lost what it held; sending all since version {max(0, version)}")
            self._send(run, client, version, again=True)
            return None
        if kind in ("scores", "update"):  # what it said in the beginning is outdated
            known = self.guests.known
            known[client] = replace(known[client], held=None)
        if kind == "scores" and run.final:
            found = self._scores(run, client, said(Scored, about).scores)
            return Update(0, client, {}, {}, {}, 1, {}, found)
        if kind == "update" and not run.final:
            update = decode_update(reply, start, client)
            check_metrics(update.metrics)
            found = self._scores(run, client, update.scores)
            return replace(update, scores=found, resent=self._resent(run, client))
        raise UserError(f"a reply of kind {text(kind)[:40]!r}, which was not asked for")

    def _scores(self, run: _Exchange, client: str, found: Mapping[str, float]) -> dict[str, float]:
        """Those that count: asked for, and of rows that were declared."""
        checked = check_scores(found, self.server.task)
        return checked if run.evaluate and self.guests.known[client].validation else {}
