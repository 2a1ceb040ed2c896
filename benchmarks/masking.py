"""A round in which the server sees sums alone, against a plain one: seconds besides training."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.results import Figure, Row
from benchmarks.shapes import ROBERTA_LARGE, ROBERTA_LARGE_LAYERS, end, layers, start
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.remote.summing import Keeper, ProcessMemory, respond
from fedex_lora.federation.codec import decode_masked, decode_update, encode_update
from fedex_lora.federation.header import first_of
from fedex_lora.federation.loop import Exchange, run_round
from fedex_lora.federation.messages import Lost, Scores, Update, flat
from fedex_lora.federation.secure import fixed, sums
from fedex_lora.federation.secure.messages import Answer, Ask, limit
from fedex_lora.federation.secure.primitives import SECRET, add_mask
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.secure.sums import summand
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.federation.state import begin

_WORDS = {
    "masking": "masking 200 MB, at a client and at the server",
    "plain": "plain round",
    "sums": "round of sums",
    "client": "round of sums, at a client",
    "server": "round of sums, at the server",
}
CLIENTS, RANK, REPEATS = ("a", "b", "c"), 64, 3


class Clients:
    """Clients that have trained already; every message is made and read as bytes.

    Attributes:
        seconds: That they spent, all together.
        up: Bytes of one of them.
    """

    def __init__(self, settings: Settings, begun: AdapterState, folder: Path) -> None:
        self.settings, self.start = settings, begun
        self.seconds, self.up = 0.0, 0
        self.ends = {c: flat(end(begun, 1 + i)) for i, c in enumerate(CLIENTS)}
        secure = settings.secure or Secure()
        self.keepers = {c: Keeper(c, folder, 1, secure, ProcessMemory()) for c in CLIENTS}

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        for client in exchange.clients:
            began = perf_counter()
            update = Update(exchange.round, client, self.ends[client], 100)
            blob = encode_update(update, self.start)
            self.seconds, self.up = self.seconds + perf_counter() - began, len(blob)
            yield decode_update(blob, self.start, client)

    def evaluate(self, exchange: Exchange) -> Iterator[Scores | Lost]:
        yield from ()

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        for client, ask in asks.items():
            about = {"kind": "secure", "federation": "0" * 32, "lineage": [[0, ""]]}
            about |= {"client": client, "version": 0, "step": ask.step, "ask": ask.about}
            update = Update(1, client, self.ends[client], 100)
            began = perf_counter()
            blob = respond(
                about,
                self.keepers[client],
                lambda widths, own=update: summand(self.settings, widths, self.start, own),
            )
            self.seconds, self.up = self.seconds + perf_counter() - began, len(blob)
            vector = decode_masked(blob, limit(ask.numbers))
            numbers = None if vector is None else vector.numpy().view(np.uint64)
            yield Answer(client, first_of(blob)["about"]["answer"], numbers, len(blob))


def masking(settings: Settings, begun: AdapterState) -> float:
    """Seconds for numbers of 200 MB: sizes, fixed point and masks at a client, and at the server
    the seeds of all taken off their sum, and the numbers read."""
    own = Update(1, "a", flat(end(begun, 1)), 100)
    tensors = summand(settings, sums.widths(settings, 1, CLIENTS, True), begun, own).tensors
    seeds = [secrets.token_bytes(SECRET) for _ in CLIENTS]
    began = perf_counter()
    exponents = fixed.sizes(fixed.votes(tensors))
    vector = fixed.encode(tensors, exponents, 100, 40, len(CLIENTS))
    for sign in (1, -1):
        for seed in seeds:
            add_mask(vector, seed, sign)
    fixed.decode(vector, {n: tuple(t.shape) for n, t in tensors.items()}, exponents, 40)
    return perf_counter() - began


def row() -> Row:
    """FedEx-LoRA of three clients, each of whom sends 200 MB under masks."""
    shapes = layers(ROBERTA_LARGE, ROBERTA_LARGE_LAYERS, RANK)
    examples = dict.fromkeys(CLIENTS, 100)
    plain = Settings(METHODS["fedex"], 0, CLIENTS, shapes, 1, examples=examples)
    summed = Settings(METHODS["fedex"], 0, CLIENTS, shapes, 1, examples=examples, secure=Secure())
    found: dict[str, list[float]] = {n: [] for n in _WORDS}
    sent = {}
    first = start(shapes)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPEATS):
            found["masking"].append(masking(summed, first))
            for name, settings in (("plain", plain), ("sums", summed)):
                clients = Clients(settings, first, Path(folder))
                state = begin(settings, first)
                began = perf_counter()
                record = (
                    secure_round(state, settings, clients)
                    if settings.secure
                    else run_round(state, settings, clients)
                )[1]
                server = perf_counter() - began - clients.seconds
                found[name].append(clients.seconds / len(CLIENTS) + server)
                sent[name] = record["bytes_up"]["a"]
                if settings.secure:
                    found["client"].append(clients.seconds / len(CLIENTS))
                    found["server"].append(server)
    return _row(found, sent)


def _row(found: Mapping[str, list[float]], sent: Mapping[str, int]) -> Row:
    medians = {name: float(np.median(values)) for name, values in found.items()}
    spread = {n: (max(v) - min(v)) / medians[n] for n, v in found.items()}
    figures = [
        Figure(
            "masking over a plain round, besides training",
            medians["masking"] / medians["plain"],
            "×",
            at_most=2,
        ),
        Figure("round of sums over a plain round", medians["sums"] / medians["plain"], "×"),
    ]
    figures += [Figure(_WORDS[n], medians[n], "s", spread[n]) for n in _WORDS]
    figures += [Figure(f"a client sends, {_WORDS[n]}", sent[n], "B") for n in ("plain", "sums")]
    return Row(
        "Secure aggregation: RoBERTa-large's query and value, rank 64, three clients",
        figures,
        [
            "Messages are made and read as bytes and cross no network; clients work side by side, "
            "so their time is that of one. Masking is fixed point and masks. Most of the rest of a "
            "round of sums are sketches of products, and what recovers the sum from them."
        ],
    )
