"""One round in which the server sees sums alone. It ends in the same state as `run_round`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.federation.checks import account, rounding, too_large
from fedex_lora.federation.loop import Exchange, count_down, each_once
from fedex_lora.federation.messages import Lost, flat, norm_of
from fedex_lora.federation.noise import WITHIN
from fedex_lora.federation.record import Record, Taken, Tally, record_of
from fedex_lora.federation.secure import fixed, sums
from fedex_lora.federation.secure.messages import SUMS, Answer, Ask, SecureTransport, Step, Sum
from fedex_lora.federation.secure.opening import Book, Unopened
from fedex_lora.federation.secure.primitives import Vector, canonical
from fedex_lora.federation.secure.told import fingerprint, origin
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, step

_UNUSABLE = (UserError, LookupError, TypeError, ValueError, AttributeError)
_SLACK = 1 + 1e-5  # of a norm that was clipped in float32


class TooFew(QuorumLost):
    """Too few clients are left to open a sum."""


def secure_round(
    state: ServerState,
    settings: Settings,
    transport: SecureTransport,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[ServerState, Record]:
    """Keys, shares, training and sizes, numbers, and twice the shares that open a sum.

    A round that loses too many clients is begun anew, with new masks, as often as the settings
    have it. If noise is in its numbers, only as long as nobody was asked for shares of them: so
    what is released of a round, and has to be paid for, is one sum.

    Args:
        note: Is told of a round that is begun anew.

    Returns:
        The next state and the round's record, without what is a single client's.

    Raises:
        QuorumLost: Too few clients are left to open a sum (`TooFew`), or it is nothing to train
            from; `state` still stands.
    """
    assert settings.secure is not None
    given_up: list[_Round] = []
    while True:
        current = _Round(state, settings, transport, len(given_up))
        try:
            after, record = current.run()
            break
        except TooFew as error:
            released = current.opening and settings.secure.noise is not None
            if len(given_up) == settings.secure.repeat or released:
                raise
            given_up.append(current)
            note(f"{error}; the round is begun anew ({len(given_up)} of {settings.secure.repeat})")
    if given_up:
        record["begun_anew"] = len(given_up)
    for earlier in given_up:
        for spent, more in (("bytes_down", earlier.down), ("bytes_up", earlier.tally.up)):
            for client, count in more.items():
                record[spent][client] = record[spent].get(client, 0) + count
    return after, record


class _Round:
    """A round under way.

    Attributes:
        attempt: How often it was given up before.
        books: What is known of the two sums.
        tally: Who was lost, and why.
        opening: Whether clients were asked for shares of the numbers' sum.
    """

    def __init__(
        self, state: ServerState, settings: Settings, transport: SecureTransport, attempt: int
    ) -> None:
        assert settings.secure is not None
        self.state, self.settings, self.secure = state, settings, settings.secure
        self.transport, self.attempt, self.opening = transport, attempt, False
        self.round, self.asked = state.version + 1, settings.sample(state.version + 1)
        self.tally, self.down = Tally(), dict.fromkeys(self.asked, 0)
        self.bound = {} if settings.clip is None else {"clip": settings.clip}
        self.accounts: dict[str, dict[str, float]] = {}
        context = f"{secrets.token_hex(16)} round {self.round}"
        self.context = context
        self.books = {x: Book(f"{context} {x}", self.secure.threshold) for x in SUMS}

    def run(self) -> tuple[ServerState, Record]:
        start = AdapterState(self.state.factors, self.state.head)
        self._keys()
        members = self._shares()
        begun = self.settings.method.assignment.own and self.state.version > 0
        begun = bool(begun) or any(bool(f.B.any()) for f in self.state.factors.values())
        widths = sums.widths(self.settings, self.round, members, begun)
        shapes = sums.shapes(self.settings, self.round, widths, self.state.head)
        self.origin = origin(self.settings, start, self.state.ledger)
        told = fingerprint(self.round, self.settings.clip, widths, self.origin)
        votes, present = self._train(members, widths, len(shapes) * fixed.LEVELS)
        left = self._open("sizes", votes, present, told)
        exponents = fixed.sizes(votes)
        about = {"exponents": exponents, "halvings": self._halvings(members)}
        count = sum(math.prod(shape) for shape in shapes.values())
        total, present = self._summed("send", dict.fromkeys(left, about), count)
        self.opening = True
        self._open("numbers", total, present, fingerprint(told, exponents, about["halvings"]))
        began = perf_counter()
        found = fixed.decode(total, shapes, exponents, self.secure.bits)
        self._check(found, about["halvings"], present)
        if self.secure.noise is not None:  # over those who were asked: a number nobody changes
            found["count"] *= len(self.asked) / len(present)
        result = sums.aggregate(self.settings, self.round, widths, start, found, len(present))
        after = step(self.state, self.settings, result, present, {})
        if (broken := too_large(after)) is not None:
            raise QuorumLost(
                f"round {self.round}: the sum is beyond what can be trained from ({broken}); whose "
                "doing it is cannot be seen in it"
            )
        self.tally.seconds += perf_counter() - began
        rows = self.settings.examples
        self.tally.taken = {c: Taken(rows.get(c, 0), self.accounts[c]) for c in present}
        record = record_of(self.settings, after, result, self.tally, self.down)
        loss, having = (found["loss"] / found["count"]).tolist()
        if having:
            record["loss"] = loss / having
        if WITHIN in found:  # noised by the clients, as all of the sum
            record[WITHIN] = found[WITHIN].item() * 2.0 ** about["halvings"]
        return after, {**record, "secure": True}

    def _keys(self) -> None:
        self.published: dict[str, Any] = {}

        def take(answer: Answer) -> None:
            for label, book in self.books.items():
                keys = answer.about["keys"][label]
                book.keys[answer.client] = {x: str(keys[x]) for x in ("mask", "channel", "seed")}
            self.published[answer.client] = {
                "keys": {label: book.keys[answer.client] for label, book in self.books.items()},
                "signature": answer.about["signature"],
            }

        about = {"context": self.context}
        self._ask("keys", dict.fromkeys(self.asked, about), take)
        for book in self.books.values():  # of who sent half of them
            book.keys = {name: book.keys[name] for name in self.published}
        self._enough(self.published)

    def _shares(self) -> list[str]:
        """Who takes part: those who dealt shares of their secrets."""
        self.letters: dict[str, Any] = {}

        def take(answer: Answer) -> None:
            dealt = answer.about["dealt"]
            for label, book in self.books.items():
                if dealt[label]["commitments"].keys() != set(book.around[answer.client]):
                    raise UserError("dealt shares to others than its neighbours")
            for label, book in self.books.items():
                book.commitments[answer.client] = dealt[label]["commitments"]
            self.letters[answer.client] = {label: dealt[label]["letters"] for label in self.books}

        about = {"everybody": self.published}
        self._ask("shares", dict.fromkeys(self.published, about), take)
        self._enough(self.letters)
        return sorted(self.letters)

    def _train(
        self, members: list[str], widths: Mapping[str, int], count: int
    ) -> tuple[Vector, list[str]]:
        """The sum of the votes for sizes, and whose they are."""
        asks = {}
        for client in members:
            letters, commitments = {}, {}
            for label, book in self.books.items():
                senders = [c for c in book.around[client] if c in self.letters and c != client]
                letters[label] = {c: self.letters[c][label][client] for c in senders}
                commitments[label] = {c: book.commitments[c][client] for c in senders}
            asks[client] = self.bound | {
                "round": self.round,
                "letters": letters,
                "commitments": commitments,
                "widths": dict(widths),
            }
        for client, nbytes in count_down(Exchange(self.state, self.settings, members)).items():
            self.down[client] += nbytes
        return self._summed("train", asks, count)

    def _summed(
        self, what: Step, asks: Mapping[str, Mapping[str, Any]], count: int
    ) -> tuple[Vector, list[str]]:
        """The sum of the vectors that come, mod 2⁶⁴, and whose they are."""
        total = np.zeros(count, np.uint64)

        def take(answer: Answer) -> None:
            vector = answer.vector
            if vector is None or vector.shape != total.shape or vector.dtype != np.uint64:
                raise UserError(f"sent no vector of {count} numbers")
            if what == "train":
                if answer.about["start"] != self.origin:
                    raise UserError("it starts from another model than the coordinator's")
                self.accounts[answer.client] = account(answer.about, self.settings)
            np.add(total, vector, out=total)

        present = self._ask(what, asks, take, count)
        self._enough(present)
        return total, sorted(present)

    def _open(self, label: Sum, total: Vector, present: list[str], told: str) -> list[str]:
        """Takes the masks off a sum of clients that were told so; who helped is still there."""
        book, shares = self.books[label], {}

        def take(answer: Answer) -> None:
            given = {str(name): str(share) for name, share in answer.about["shares"].items()}
            book.check(answer.client, given, present)
            shares[answer.client] = given

        about = {"sum": label, "present": present}
        left = self._ask("open", dict.fromkeys(present, about), take)
        began = perf_counter()
        try:
            book.open(total, present, shares, told)
        except Unopened as error:
            self._lost_quorum(f"the sum cannot be opened: {error}")
        self.tally.seconds += perf_counter() - began
        return sorted(left)

    def _ask(
        self,
        what: Step,
        asks: Mapping[str, Mapping[str, Any]],
        take: Callable[[Answer], None],
        numbers: int = 0,
    ) -> list[str]:
        """Asks all, takes each answer as it comes, and says whose could be used."""
        names, useful = sorted(asks), []
        exchange = Exchange(self.state, self.settings, names, attempt=self.attempt)
        messages = {client: Ask(what, asks[client], numbers) for client in names}
        for client, message in messages.items():
            self.down[client] += message.nbytes
        replies = self.transport.ask(exchange, messages)
        for reply in each_once(names, replies, self.tally.refused):
            self.down[reply.client] += reply.resent
            if isinstance(reply, Lost):
                (self.tally.refused if reply.refused else self.tally.lost)[reply.client] = (
                    reply.reason
                )
                continue
            self.tally.up[reply.client] = self.tally.up.get(reply.client, 0) + nbytes(reply)
            try:
                take(reply)
                useful.append(reply.client)
            except _UNUSABLE as error:
                self.tally.refused[reply.client] = f"sent what cannot be used: {error}"[:500]
        return useful

    def _halvings(self, members: Iterable[str]) -> int:
        """How often weights are halved so that no sum of these clients' numbers can overflow."""
        members = list(members)
        rows = [self.settings.examples.get(c, 1) for c in members]
        largest = 1 if self.settings.weights == "uniform" else max(rows)
        most = 2.0 ** (63 - self.secure.bits) / len(self.published)
        return max(0, math.ceil(math.log2(largest / most)))

    def _check(self, found: Mapping[str, torch.Tensor], halvings: int, present: list[str]) -> None:
        """That the sum is one of these clients' numbers, as far as a sum can show."""
        declared = self.settings.examples
        uniform = self.settings.weights == "uniform"
        if uniform or all(client in declared for client in present):
            rows = sum(1 if uniform else declared[client] for client in present)
            got = found["count"].item() * 2.0**halvings
            if abs(got - rows) > 0.5:
                raise QuorumLost(
                    f"round {self.round}: the clients' rows sum to {got:.10g}; they declared "
                    f"{rows:,}. Somebody sent other numbers than were asked for, or masks that do "
                    "not belong to the keys"
                )
        most = self.settings.max_norm
        means = [t for name, t in found.items() if sums.is_learned(name)]
        norm = norm_of(t / found["count"] for t in means)
        if most is not None and self.secure.noise is not None:
            noise = self.secure.noise.at(self.settings.clip)
            spread = math.sqrt(sum(t.numel() for t in means)) + 6  # of noise, in deviations
            most += noise.deviation * spread / math.sqrt(noise.least * len(present))
        ends = flat(AdapterState(self.state.factors, self.state.head)).values()
        if most is not None and norm > most * _SLACK + rounding(ends):
            raise QuorumLost(
                f"round {self.round}: the mean changed by {norm:.4g}; every client clips its "
                f"update to federation.max_norm, {most:g}, so somebody did not"
            )

    def _enough(self, left: Iterable[str]) -> None:
        count, half = len(list(left)), len(self.published) // 2 + 1
        needed = max(2, self.settings.min_clients, self.secure.threshold or half)
        if count < needed:
            self._lost_quorum(
                f"{count} clients are left; {needed} must stay (federation.min_clients, "
                "privacy.secure_aggregation.threshold)"
            )

    def _lost_quorum(self, why: str) -> None:
        reasons = [f"{c}: {text}" for c, text in {**self.tally.lost, **self.tally.refused}.items()]
        raise TooFew("; ".join([f"round {self.round}: {why}", *reasons]))


def nbytes(answer: Answer) -> int:
    """Bytes of an answer: of its message, or without one of what it would hold."""
    if answer.nbytes is not None:
        return answer.nbytes
    return len(canonical(answer.about)) + (0 if answer.vector is None else answer.vector.nbytes)
