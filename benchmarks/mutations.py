"""Thousands of spoiled messages, one a round, through the coordinator's real code.

    python -m benchmarks.mutations --count 800

In every round five clients reply; one reply is spoiled at random. It must be refused or lost and
named in the record, or be an update within its bounds; it may not vanish, end the round, or move
the global model further than an update within its bounds can.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.spoil import parts, whole
from fedex_lora.aggregation.adapter import AdapterState, LayerShape, fresh
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.remote.courier import Failed, Waits
from fedex_lora.engines.remote.engine import RemoteEngine
from fedex_lora.engines.remote.guests import Guest, Guests
from fedex_lora.engines.remote.wire import PROTOCOL, Facts, Identity
from fedex_lora.federation.codec import encode_about, encode_update
from fedex_lora.federation.loop import Record, run_round
from fedex_lora.federation.messages import Update, flat
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, begin, start_of

PAIRS = (
    ("fedex", "float32"),
    ("fedex", "bfloat16"),
    ("fedex-svd", "float32"),
    ("fedex-keep", "bfloat16"),
    ("flexlora", "float32"),
)
ROWS = {"a": 5, "b": 3, "c": 4, "d": 9, "e": 4}
LIAR = "b"
SITES = {
    "q": LayerShape(out=7, inp=5, rank=3, scale=1.7),
    "v": LayerShape(out=6, inp=9, rank=2, scale=0.6),
}
IDENTITY = Identity("0" * 32, ((0, "m"),))
STRANGE: Sequence[Any] = (
    *(None, True, -1, 0, 10**9, 10**30, 3.7, 1e300, -1e300, math.nan, math.inf),
    *("", "2", "x" * 100_000, "../../etc", "\x1b[31m\n", "a", [], [[[]]] * 50, {}, {"a": {"b": 1}}),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one spoiled message: refused, lost, accepted, vanished, escaped, beyond."""

    what: str
    how: str
    text: str


def settings_of(method: str, dtype: str) -> Settings:
    """A federation of five with all bounds at their defaults."""
    return Settings(
        METHODS[method],
        seed=7,
        clients=tuple(sorted(ROWS)),
        layers=SITES,
        rounds=3,
        rank=2 if METHODS[method].residual == "truncated" else None,
        wire_dtype=getattr(torch, dtype),
        norm_ratio=10.0,
        max_share=0.9,
        examples=ROWS,
    )


def first_state(settings: Settings) -> ServerState:
    generator = torch.Generator().manual_seed(0)
    head = {"w": torch.randn(4, 3, generator=generator)}
    return begin(settings, AdapterState(fresh(settings.layers, settings.seed), head))


def honest(settings: Settings, state: ServerState, client: str) -> bytes:
    """An update as a client sends it."""
    generator = torch.Generator().manual_seed(ord(client))
    start = start_of(state, settings, client)

    def drift(t: Tensor) -> Tensor:
        return t + 0.1 * torch.randn(t.shape, generator=generator)

    tensors = {name: drift(t) for name, t in flat(start).items()}
    metrics = {"loss": 1.0, "steps": 2.0, "seconds": 0.1}
    update = Update(state.version + 1, client, tensors, ROWS[client], metrics)
    about = {"protocol": PROTOCOL, "federation": IDENTITY.federation, "client": client}
    return encode_update(update, start, settings.wire_dtype, {**about, "kind": "update"})


class Replies:
    """A courier that brings replies made beforehand."""

    def __init__(self, replies: Mapping[str, bytes | Failed]) -> None:
        self.replies = replies
        self._tickets: dict[str, str] = {}

    def nodes(self) -> list[str]:
        return sorted(self.replies)

    def owner(self, node: str) -> str:
        return node

    def bound(self, most: int) -> None: ...

    def send(self, node: str, blob: bytes, round: int, seconds: float) -> str:
        ticket = str(len(self._tickets))
        self._tickets[ticket] = node
        return ticket

    def collect(self, tickets: Sequence[str]) -> list[tuple[str, bytes | Failed]]:
        return [(t, self.replies[self._tickets[t]]) for t in tickets]


def played(
    settings: Settings, state: ServerState, replies: Mapping[str, bytes | Failed]
) -> tuple[ServerState, Record]:
    """One round with these replies."""
    guests = Guests(Replies(replies), Facts({}), IDENTITY, Waits(0.1, 0.0), settings=settings)
    guests.known = {c: Guest(c, rows, 4, None) for c, rows in ROWS.items()}
    guests.declared, guests.began = dict(ROWS), True
    guests._present = guests._met = set(ROWS)
    engine = RemoteEngine(guests, settings, None)  # type: ignore[arg-type]  # nothing is scored
    return run_round(state, settings, engine)


def outcome(settings: Settings, state: ServerState, reply: bytes, others: Mapping) -> Outcome:
    """What becomes of the liar's reply, beside the honest ones of the others."""
    before, _ = played(settings, state, {**others, LIAR: Failed("away")})
    try:
        after, record = played(settings, state, {**others, LIAR: reply})
    except Exception as error:  # whatever it is, it must not get here
        return Outcome("escaped", "", f"{type(error).__name__}: {error}")
    told = {**record["refused"], **record["lost"]}.get(LIAR, "")
    if (
        len(told) > 1000
        or set(record["clients"]) - set(ROWS)
        or not set(others) <= set(record["clients"])
    ):
        return Outcome("beyond", "", told[:200])
    if LIAR not in record["clients"]:
        what = "refused" if LIAR in record["refused"] else "lost" if told else "vanished"
        return Outcome(what, "", told)
    return Outcome(
        "beyond" if moved_too_far(settings, state, before, after, record) else "accepted", "", ""
    )


def moved_too_far(
    settings: Settings, state: ServerState, before: ServerState, after: ServerState, record: Record
) -> bool:
    """Whether the liar's update moved the model further than one within its bounds can.

    With norm n ≤ 10 medians, ‖s(BA − B⁰A⁰)‖ ≤ s·(n‖A⁰‖ + n‖B⁰‖ + n²), of which its share counts;
    its share is also taken from the others, whose updates obey the same bound.
    """
    n = 10 * sorted(record["norms"][c] for c in ROWS if c != LIAR)[-1]
    share = ROWS[LIAR] / sum(ROWS.values())
    if abs(record["weights"][LIAR] - share) > 1e-9:
        return True
    if not (after.head["w"] - before.head["w"]).norm() <= 2 * share * n:
        return True
    start = start_of(state, settings, LIAR)
    for name, site in settings.layers.items():
        a, b = start.layers[name].A.norm().item(), start.layers[name].B.norm().item()
        most = 2 * share * site.scale * (n * a + n * b + n * n)
        if not (_global(after, name) - _global(before, name)).norm() <= most:
            return True
    return False


def _global(state: ServerState, name: str) -> Tensor:
    f, total = state.factors[name], state.ledger.total(name)
    product = f.scale * f.B.double() @ f.A.double()
    return product if total is None else product + total.double()


def bytes_flipped(reply: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(reply)
    for _ in range(draw.randint(1, 20)):
        spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
    return bytes(spoiled)


def cut_or_longer(reply: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return reply[: draw.randrange(len(reply))]
    return reply + bytes(draw.choice((1, 100, 10**6)))


def header_length(reply: bytes, draw: random.Random) -> bytes:
    return draw.choice((0, 1, 7, 2**20, 2**40, 2**63)).to_bytes(8, "little") + reply[8:]


def field(reply: bytes, draw: random.Random) -> bytes:
    """A field of the JSON is another, is missing, or is there twice."""
    tensors, meta = parts(reply)
    place = draw.choice((meta, meta["about"], meta["metrics"]))
    name = draw.choice([*place, "new"])
    if draw.random() < 0.15:
        text = json.dumps(meta)
        return whole(tensors, text[:-1] + f', "{draw.choice(list(meta))}": {json.dumps(1)}}}')
    if draw.random() < 0.15:
        place.pop(name, None)
    else:
        place[name] = draw.choice(STRANGE)
    return whole(tensors, meta)


def numbers(reply: bytes, draw: random.Random) -> bytes:
    """Entries that are too large, too small, or none."""
    tensors, meta = parts(reply)
    large, larger = 10 ** draw.uniform(0, 6), 10 ** draw.uniform(-5, 38)
    factor = draw.choice((-1.0, 0.0, math.nan, math.inf, large, larger))
    chosen = draw.sample(sorted(tensors), draw.randint(1, len(tensors)))
    for name in chosen:
        value = tensors[name].clone()
        if draw.random() < 0.5:
            value *= factor
        else:
            value.view(-1)[draw.randrange(value.numel())] = factor
        tensors[name] = value
    return whole(tensors, meta)


def shapes(reply: bytes, draw: random.Random) -> bytes:
    """Tensors of another shape, dtype or name, missing ones, and more of them."""
    tensors, meta = parts(reply)
    name, other = draw.sample(sorted(tensors), 2)
    changes: Sequence[Callable[[], object]] = (
        lambda: tensors.update({name: tensors[name].T}),
        lambda: tensors.update({name: tensors[name].reshape(-1)}),
        lambda: tensors.update({name: tensors[name][:0]}),
        lambda: tensors.update({name: tensors[name].to(draw.choice((torch.float64, torch.int32)))}),
        lambda: tensors.update({name: tensors[name].half()}),
        lambda: tensors.update({name: tensors[other], other: tensors[name]}),
        lambda: tensors.pop(name),
        lambda: tensors.update({f"{name}/more": tensors[name]}),
        lambda: tensors.update({f"ledger/1/q/{i}": tensors[name] for i in range(300)}),
        tensors.clear,
    )
    draw.choice(changes)()
    return whole(tensors, meta)


def another_kind(reply: bytes, draw: random.Random) -> bytes:
    """A reply of another kind, round, run or client."""
    tensors, meta = parts(reply)
    about = meta["about"]
    kind = draw.choice(("hello", "unfit", "lacks", "scores", "failed", "round", "final", "exec"))
    more = {"reason": "x" * draw.choice((1, 900_000)), "version": draw.choice((-1, 0, 7, 2.5))}
    changes: Sequence[Callable[[], bytes]] = (
        lambda: encode_about({**about, "kind": kind, **more, "scores": {"accuracy": 1e300}}),
        lambda: whole(tensors, {**meta, "round": draw.choice((0, 2, 99))}),
        lambda: whole(tensors, {**meta, "about": {**about, "federation": "1" * 32}}),
        lambda: whole(tensors, {**meta, "about": {**about, "client": draw.choice("acz")}}),
        lambda: whole(tensors, {**meta, "examples": draw.choice((0, 1, 10**9))}),
        lambda: whole(tensors, {**meta, "drift": not meta["drift"]}),
    )
    return draw.choice(changes)()


def noise(reply: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return draw.randbytes(draw.randint(0, 5000))
    cut = draw.randrange(len(reply))
    return reply[cut:] + reply[:cut]


WAYS = (bytes_flipped, cut_or_longer, header_length, field, numbers, shapes, another_kind, noise)


def trial(method: str, dtype: str, count: int, seed: int = 0) -> list[Outcome]:
    """So many spoiled messages of one pair of method and wire dtype."""
    settings = settings_of(method, dtype)
    state = first_state(settings)
    replies = {client: honest(settings, state, client) for client in ROWS}
    others = {client: reply for client, reply in replies.items() if client != LIAR}
    found = []
    for i in range(count):
        draw = random.Random(f"{seed} {method} {dtype} {i}")
        way = WAYS[i % len(WAYS)]
        reply = way(replies[LIAR], draw)
        found.append(replace(outcome(settings, state, reply, others), how=way.__name__))
    return found


KINDS = ("refused", "lost", "accepted", "vanished", "escaped", "beyond")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations")
    parser.add_argument("--count", type=int, default=800, help="messages for each pair")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| method, wire dtype | messages |", " | ".join(KINDS), "|")
    print("|---|---:|" + "---:|" * len(KINDS))
    for method, dtype in PAIRS:
        found = trial(method, dtype, asked.count, asked.seed)
        counts = Counter(one.what for one in found)
        print(
            f"| {method}, {dtype} | {len(found)} |", " | ".join(str(counts[k]) for k in KINDS), "|"
        )
        for one in found:
            if one.what in KINDS[3:]:
                print(f"    {one}")


if __name__ == "__main__":
    main()
