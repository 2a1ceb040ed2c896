"""The coordinator's side of a round across machines: sends, collects, waits, gives up.

It knows nothing of how messages travel; a `Courier` carries them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.guests import Guests
from fedex_lora.engines.remote.replies import (
    Failure,
    Lacking,
    Scored,
    about_reply,
    check_scores,
    said,
    text,
)
from fedex_lora.engines.remote.under_way import Patience, Run, Sent
from fedex_lora.engines.remote.wire import Identity, agreement
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import UserError, some
from fedex_lora.federation.codec import (
    broadcast_nbytes,
    decode_masked,
    decode_update,
    encode_about,
    encode_broadcast,
    most_up,
)
from fedex_lora.federation.late import earlier_start
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Lost, Scores, Update
from fedex_lora.federation.secure.messages import Answer, Ask, limit
from fedex_lora.federation.settings import Settings

OFTEN = 0.5  # seconds between two looks for replies
_UNUSABLE = (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


Reply = Update | Scores | Answer | Lost


class RemoteEngine:
    """A transport to clients on other machines.

    Args:
        guests: Who is there.
        settings: The federation's; its clients are those of the roster.
        stage: The coordinator's own model.
        progress: Is told (round, "", clients that have answered, clients in all, mean loss of those
            who told theirs).
        remember: Keeps the identity and the declared rows, before a round's messages are sent.
    """

    scores_later = False

    def __init__(
        self,
        guests: Guests,
        settings: Settings,
        stage: Stage,
        progress: Callable[[int, str, int, int, float | None], None] | None = None,
        remember: Callable[[Identity, Mapping[str, int]], None] = lambda identity, rows: None,
    ) -> None:
        self.guests, self.settings, self.stage = guests, settings, stage
        self.courier, self.waits, self.note = guests.courier, guests.waits, guests.note
        self.progress, self._remember = progress, remember
        self._late: dict[str, Sent] = {}
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

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        """Sends to all, and yields what comes, until all have answered or are given up."""
        self._remember(self.guests.identity, self.examples)
        starts = (exchange.start(client) for client in exchange.clients)
        self.courier.bound(max(most_up(start).whole for start in starts))
        for reply in self._replies(exchange, "round"):
            assert isinstance(reply, Update | Lost)
            yield reply

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        """One step of a round in which only sums are seen."""
        self._remember(self.guests.identity, self.examples)
        self.courier.bound(max(limit(ask.numbers).whole for ask in asks.values()))
        for reply in self._replies(exchange, "secure", asks):
            assert isinstance(reply, Answer | Lost)
            yield reply

    def evaluate(self, exchange: Exchange) -> Iterator[Scores | Lost]:
        """Sends the model to those who have rows of their own, the last one to everybody, and
        yields their scores. Nobody is waited for who is not here."""
        self.guests.greet()
        for reply in self._replies(exchange, "final" if exchange.final else "evaluate"):
            assert isinstance(reply, Scores | Lost)
            yield reply

    def _replies(
        self, exchange: Exchange, kind: str, asks: Mapping[str, Ask] | None = None
    ) -> Iterator[Reply]:
        names = [c for c in exchange.clients if kind != "evaluate" or self.validation.get(c, 1)]
        messages = {client: exchange.message(client) for client in names}
        run = Run(exchange, kind, messages, asks=asks or {})
        needed = self.settings.min_clients if kind == "round" else 0
        if all(ask.step == "keys" for ask in run.asks.values()) and run.asks:
            assert self.settings.secure is not None  # later on who comes back has lost its keys
            half = len(names) // 2 + 1
            needed = max(self.settings.min_clients, self.settings.secure.threshold or half)
        enough = self.settings.sample_size if kind == "round" else len(names)
        patience = Patience(self.waits.clients)
        # whose message may have been lost with its time to live is asked again
        since = time.monotonic() - self._staleness * self.waits.round
        busy = {sent.client: sent.round for sent in self._late.values() if sent.expires > since}
        busy = busy if self._staleness else {}
        for client in names:
            if kind == "round" and client in busy:
                yield self._lost(run, client, f"still at work on round {busy[client]}")
            else:
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
            for reply in self._collect(run):
                punctual = not isinstance(reply, Update) or reply.round == exchange.round
                run.good += isinstance(reply, Update | Answer) and punctual
                if isinstance(reply, Update) and "loss" in reply.metrics:
                    run.losses.append(reply.metrics["loss"])
                yield reply
            self._tell(run)
            if kind == "round" and run.good >= enough:
                for sent in run.under_way.values():
                    yield Lost(sent.client, f"slower than the first {enough} (oversample)")
                self._late |= run.under_way
                return
            if run.under_way or run.waiting:
                time.sleep(OFTEN)

    def _tell(self, run: Run) -> None:
        total = len(run.messages)
        done = total - len(run.under_way) - len(run.waiting)
        trained = run.trains and any(map(run.brings, run.messages))
        if self.progress is not None and trained and done != run.told:
            run.told = done
            loss = sum(run.losses) / len(run.losses) if run.losses else None
            self.progress(run.number, "", done, total, loss)

    def _tell_waiting(self, run: Run, needed: int) -> None:
        why = some([f"{client} ({reason})" for client, reason in run.waiting.items()])
        until = time.strftime("%H:%M", time.localtime(time.time() + self.waits.clients))
        self.note(f"round {run.number} needs {needed} clients; waiting for {why} until {until}")

    def _give_up(self, run: Run) -> Iterator[Lost]:
        """Of those who wait; who was cut off just before the round may still make it."""
        for client, reason in list(run.waiting.items()):
            if client in run.spent or not self.guests.soon_back(client):
                del run.waiting[client]
                yield self._lost(run, client, reason)

    def _offer(self, run: Run, client: str) -> None:
        """Sends the round's message, if the client is there."""
        guest = self.guests.here(client)
        if guest is None:
            run.waiting[client] = self.guests.why_absent(client)
            return
        held = run.exchange.state.held.get(client, 0)
        if client in run.exchange.state.held and guest.held is not None:
            held = min(held, guest.held)
        run.waiting.pop(client, None)
        self._send(run, client, held)

    def _send(self, run: Run, client: str, held: int, again: bool = False) -> None:
        """The message for a client that holds version `held`; its bytes are counted here."""
        exchange, node = run.exchange, self.guests.known[client].node
        believed = exchange.state.held.get(client, 0)
        message = run.messages[client] if held == believed else exchange.message(client, held)
        about = self.guests.say(run.kind) | {
            "client": client,
            "recipe": self._agreement,
            "version": exchange.state.version,
            "held": held,
            "evaluate": exchange.scored and not run.trains,
        }
        if run.kind == "round" and exchange.settings.clip is not None:
            about["clip"] = exchange.settings.clip
        if run.asks:
            about |= {"step": run.asks[client].step, "ask": run.asks[client].about}
        if run.brings(client):
            blob = encode_broadcast(message, self.settings.wire_dtype, about)
        else:
            blob = encode_about(about)
        round = run.number + exchange.final  # so messages of a round are told from the last one
        patience = self.waits.round * (1 + self._staleness)
        ticket = self.courier.send(node, blob, round, patience)
        self.guests.sent(run.kind, run.number, blob, ticket, client)
        if isinstance(ticket, Failed):
            run.waiting[client] = ticket.reason
            return
        run.spent[client] = run.spent.get(client, 0) + len(blob)
        if held == believed and not run.asks:
            run.counted[client] = len(blob)
        expires = time.monotonic() + self.waits.round
        updates = run.number if run.kind == "round" else 0
        run.under_way[ticket] = Sent(client, node, expires, len(blob), again, updates)

    def _resent(self, run: Run, client: str) -> int:
        """Bytes beyond the broadcast that the round loop counts; negative if nothing was sent."""
        if client not in run.counted:
            message, asked = run.messages[client], run.asks.get(client)
            sent = broadcast_nbytes(message, self.settings.wire_dtype) if run.brings(client) else 0
            run.counted[client] = sent + (0 if asked is None else asked.nbytes)
        return run.spent.get(client, 0) - run.counted[client]

    def _collect(self, run: Run) -> Iterator[Reply]:
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
        yield from self._take_late(run)

    def _take_late(self, run: Run) -> Iterator[Update]:
        """Replies to messages that nobody waits for: updates of earlier rounds, in asynchronous
        ones; what else comes is dropped."""
        tickets = [ticket for ticket, sent in self._late.items() if not self._waits(run, sent)]
        for ticket, reply in self.courier.collect(tickets) if tickets else []:
            sent = self._late.pop(ticket)
            if isinstance(reply, Failed):
                continue
            if (update := self._late_update(run, sent, reply)) is not None:
                self.guests.received("update", sent.round, reply, "taken late", sent.client)
                yield update
                continue
            self.note(f"an update of {sent.client} came too late and was dropped")
            self.guests.received(None, 0, reply, "too late: dropped", sent.client)

    @property
    def _staleness(self) -> int:
        asynchronous = self.settings.asynchronous
        return 0 if asynchronous is None else asynchronous.staleness

    def _waits(self, run: Run, sent: Sent) -> bool:
        """Whether a late update waits for the next round that can take it."""
        return bool(self._staleness and sent.round) and (
            run.kind != "round" or sent.round >= run.number
        )

    def _late_update(self, run: Run, sent: Sent, reply: bytes) -> Update | None:
        if not (self._staleness and sent.round):
            return None
        start = earlier_start(run.exchange.state, self.settings, sent.client, sent.round)
        if start is None:
            return None
        try:
            about = about_reply(reply, self.guests.identity, sent.client, most_up(start))
            found = about.get("kind") == "update"
            return decode_update(reply, start, sent.client) if found else None
        except _UNUSABLE:
            return None

    def _audit(self, run: Run, sent: Sent, reply: bytes | Failed, found: Reply | None) -> None:
        """A line on a reply: what was made of it."""
        kind, outcome = "secure" if run.asks else "update" if run.trains else "scores", "taken"
        if isinstance(reply, Failed):
            kind, outcome, reply = None, reply.reason, b""
        elif found is None:
            kind, outcome = "lacks", "asked once more"
        elif isinstance(found, Lost):
            kind, outcome = None if found.refused else "failed", found.reason
        self.guests.received(kind, run.number, reply, outcome, sent.client)

    def _lost(self, run: Run, client: str, reason: str, refused: bool = False) -> Lost:
        return Lost(client, reason, refused, self._resent(run, client))

    def _opened(self, run: Run, sent: Sent, reply: bytes | Failed) -> Reply | None:
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

    def _read(self, run: Run, sent: Sent, reply: bytes) -> Reply | None:
        client = sent.client
        asked = run.asks.get(client)
        start = run.exchange.start(client)
        most = most_up(start) if asked is None else limit(asked.numbers)
        about = about_reply(reply, self.guests.identity, client, most)
        kind = about.get("kind")
        if kind in ("failed", "undecided"):
            return self._lost(run, client, text(said(Failure, about).reason))
        if kind == "lacks" and not sent.again:
            version = said(Lacking, about).version
            if version > run.exchange.state.version:
                raise UserError(f"it claims to hold version {version}")
            self.note(f"{client} lost what it held; sending all since version {max(0, version)}")
            self._send(run, client, version, again=True)
            return None
        if kind in ("scores", "update"):  # what it said in the beginning is outdated
            known = self.guests.known
            known[client] = replace(known[client], held=None)
        if kind == "scores" and not run.trains:
            found = check_scores(said(Scored, about).scores, self.stage.task)
            wanted = run.exchange.scored and self.guests.known[client].validation
            counted = found if wanted else {}
            return Scores(client, counted, self._resent(run, client))
        if kind == "secure" and asked is not None:
            if about.get("step") != asked.step:
                raise UserError(f"an answer to {text(about.get('step'))[:40]!r}, not {asked.step}")
            vector = decode_masked(reply, most)
            numbers = None if vector is None else vector.numpy().view(np.uint64)
            resent = self._resent(run, client)
            return Answer(client, about["answer"], numbers, len(reply), resent)
        if kind == "update" and run.kind == "round":
            update = decode_update(reply, start, client)
            return replace(update, resent=self._resent(run, client))
        raise UserError(f"a reply of kind {text(kind)[:40]!r}, which was not asked for")
