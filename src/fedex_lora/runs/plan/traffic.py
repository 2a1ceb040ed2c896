"""The size of every message of a federation, before it runs and without a model: from shapes.

The size of a message depends on shapes, hardly on numbers. So the real server code is run with
made-up updates on one site of each shape, and with a few numbers for each tensor of the head;
what it sends is then laid out for all sites, by the names and in the format of the real messages.
Every client is taken to deliver in every round it is sampled for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Site, fresh
from fedex_lora.aggregation.ledger import Increment, Ledger
from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.aggregation.seeding import derive
from fedex_lora.federation.loop import Lost, run_round
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    broadcast_parts,
    ledger_tensors,
    metadata,
    update_parts,
)
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, begin, broadcast_to, start_of

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]
Message = TypeVar("Message", Broadcast, Update)

# safetensors' names; it lays wider types out first, and those of equal width in this order
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FEW = 3  # numbers that stand for a tensor of the head


@dataclass(frozen=True)
class Size:
    """How large messages are.

    Attributes:
        numbers: Entries of their tensors.
        bytes: Everything, with headers.
    """

    numbers: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.numbers + other.numbers, self.bytes + other.bytes)


def summed(sizes: Iterable[Size]) -> Size:
    """The sizes' sum.

    Example:
        >>> summed([Size(1, 4), Size(2, 8)])
        Size(numbers=3, bytes=12)
    """
    return sum(sizes, Size())


def blob_bytes(tensors: Tensors, metadata: Mapping[str, str]) -> int:
    """len(safetensors.torch.save(tensors, metadata)), from shapes and dtypes alone.

    Args:
        tensors: By name; on any device, the meta device too.

    Source:
        https://github.com/huggingface/safetensors#format

    Example:
        >>> blob_bytes({"w": torch.empty(1000, 1000, device="meta")}, {"a": "b"}) - 4 * 10**6
        104
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    order, end = {dtype: place for place, dtype in enumerate(_DTYPES)}, 0
    for name, t in sorted(tensors.items(), key=lambda item: (order[item[1].dtype], item[0])):
        begin, end = end, end + t.numel() * t.element_size()
        shape, offsets = list(t.shape), [begin, end]
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8 + end


class DryRun:
    """A federation without a model; `round` plays one round.

    Args:
        settings: The federation's.
        head: Shapes of what is trained in full; all parameters where there are no sites.
        started: Whether B is not zero in the beginning: an adapter to start from.

    Example:
        >>> from fedex_lora.aggregation.methods import METHODS
        >>> sites = {"q": Site(out=64, inp=48, rank=2, scale=1.0)}
        >>> run = DryRun(Settings(METHODS["fedex"], 0, ("a", "b", "c"), sites, rounds=2), {})
        >>> up, down = run.round()
        >>> up["a"].numbers, down["a"].numbers      # A and B; all have the start already
        (224, 0)
        >>> run.down("a").numbers                   # A, B and a residual of rank (3 − 1)·2
        672
    """

    def __init__(
        self,
        settings: Settings,
        head: Shapes,
        started: bool = False,
    ) -> None:
        self.settings, self.head = settings, head
        first: dict[Site, str] = {}  # the site that stands for all that are like it
        self._like = {name: first.setdefault(site, name) for name, site in settings.sites.items()}
        sites = {name: site for site, name in first.items()}
        self._small = replace(settings, sites=sites, max_norm=None, norm_ratio=None, examples={})
        self._state = begin(self._small, self._initial(started))
        self.ledger = Ledger((), self._increment(self._state.ledger.snapshot), 0)
        self._sizes: dict[object, Size] = {}
        self._up: dict[str, Size] = {}

    @property
    def version(self) -> int:
        """Rounds played."""
        return self._state.version

    def round(self) -> tuple[dict[str, Size], dict[str, Size]]:
        """Plays the next round; sizes of the messages up and down, by client."""
        clients = self._small.sample(self.version + 1)
        down = {client: self.down(client) for client in clients}
        # the ledger of all sites is kept apart: whether it is compacted depends on all of them
        state = replace(self._state, ledger=Ledger((), {}, self.version))
        self._state, _ = run_round(state, self._small, self)
        self._sizes.clear()
        up, self._up = self._up, {}
        for version, increment in self._state.ledger.entries:
            with torch.device("meta"):
                ledger = self.ledger.append(version, self._increment(increment))
                self.ledger = ledger.compact_if_smaller(version - 1)
        return up, down

    def down(self, client: str) -> Size:
        """The message that brings this client up to date."""
        if not self.settings.method.exchanges:
            return Size()
        state = self._state
        own = state.changed.get(f"own/{client}")
        key = (self._small.ranks.get(client), state.held.get(client), own)
        if key not in self._sizes:
            self._sizes[key] = self._down(state, client)
        return self._sizes[key]

    def catch_up(self) -> Size:
        """The message for a client that joins now: it holds the start and nothing since."""
        if not self.settings.method.exchanges:
            return Size()
        changed = {k: v for k, v in self._state.changed.items() if not k.startswith("own/")}
        state = replace(self._state, held={}, changed=changed)
        return self._down(state, self.settings.clients[0])

    def own_factors(self) -> int:
        """Bytes of what clients keep for themselves, which lies on disk."""
        return 4 * sum(self._numbers(adapter) for adapter in self._state.own.values())

    def _numbers(self, adapter: AdapterState) -> int:
        times = Counter(self._like.values())
        factors = sum(times[n] * (f.A.numel() + f.B.numel()) for n, f in adapter.sites.items())
        return factors + sum(prod(self.head[n]) for n in adapter.head)

    def checkpoint(self) -> int:
        """Bytes of the state's tensors, all float32, clients' own factors apart."""
        state, times = self._state, Counter(self._like.values())
        numbers = sum(t.numel() for t in ledger_tensors(self.ledger).values())
        numbers += self._numbers(AdapterState(state.factors, state.head))
        numbers += sum(
            times[n] * (w.left.numel() + w.right.numel()) for n, w in state.carry.items()
        )
        for key, value in state.late.items():
            kind, _, name = key.partition("/")
            numbers += prod(self.head[name]) if kind == "head" else times[name] * value.numel()
        return 4 * numbers

    def ledger_ranks(self) -> dict[str, int]:
        """By site, the rank of T as the ledger holds it; min(out, in) where it is dense."""
        ranks = dict.fromkeys(self.settings.sites, 0)
        for increment in (self.ledger.snapshot, *(inc for _, inc in self.ledger.entries)):
            for name, w in increment.items():
                ranks[name] += w.rank if isinstance(w, LowRank) else min(w.shape)
        return {
            n: min(r, s.out, s.inp)
            for (n, s), r in zip(self.settings.sites.items(), ranks.values())
        }

    def _initial(self, started: bool) -> AdapterState:
        sites = fresh(self._small.sites, self.settings.seed)
        if started:
            sites = {n: replace(f, B=torch.ones_like(f.B)) for n, f in sites.items()}
        return AdapterState(sites, {name: torch.zeros(_FEW) for name in self.head})

    def _down(self, state: ServerState, client: str) -> Size:
        message = broadcast_to(replace(state, ledger=self.ledger), self._small, client)
        return _size(*broadcast_parts(self._laid_out(message)))

    def exchange(
        self, state: ServerState, broadcasts: Mapping[str, Broadcast]
    ) -> Iterator[Update | Lost]:
        """As a transport: all clients send updates that they made up; surplus ones come late."""
        for place, client in enumerate(sorted(broadcasts)):
            if place >= self.settings.sample_size:
                yield Lost(client, "late")
                continue
            start = start_of(state, self._small, client)
            update = self._made_up(start, broadcasts[client].round, client)
            self._up[client] = self._size_up(update)
            yield update

    def _made_up(self, start: AdapterState, round: int, client: str) -> Update:
        generator = torch.Generator().manual_seed(derive(self.settings.seed, round, client))

        def trained(part: Tensors) -> dict[str, Tensor]:
            return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in part.items()}

        factors = self.settings.method.trained(round)
        a = {n: f.A for n, f in start.sites.items()} if "A" in factors else {}
        b = {n: f.B for n, f in start.sites.items()} if "B" in factors else {}
        metrics = {"loss": 1.0, "steps": 1.0, "seconds": 1.0}
        return Update(round, client, trained(a), trained(b), trained(start.head), 1, metrics)

    def _size_up(self, update: Update) -> Size:
        if not self.settings.method.exchanges:
            return Size()
        key, dtype = ("up", self._small.ranks.get(update.client)), self.settings.wire_dtype
        if key not in self._sizes:
            tensors, meta = update_parts(self._laid_out(update), dtype)
            self._sizes[key] = _size({n: t.to(dtype) for n, t in tensors.items()}, meta)
        return self._sizes[key]

    def _laid_out(self, message: Message) -> Message:
        """The message with all sites and the head at its full size."""
        return replace(
            message,
            A={n: self._sent(message.A[r]) for n, r in self._like.items() if r in message.A},
            B={n: self._sent(message.B[r]) for n, r in self._like.items() if r in message.B},
            head={n: self._sent(value, self.head[n]) for n, value in message.head.items()},
        )

    def _increment(self, part: Increment) -> Increment:
        whole: dict[str, LowRank | Tensor] = {}
        for name, like in self._like.items():
            if like in part:
                w = part[like]
                factors = isinstance(w, LowRank)
                whole[name] = (
                    LowRank(self._sent(w.left), self._sent(w.right)) if factors else self._sent(w)
                )
        return whole

    def _sent(self, value: Tensor, shape: torch.Size | None = None) -> Tensor:
        """A tensor without numbers, of the dtype in which a broadcast would hold `value`."""
        dtype = self.settings.wire_dtype
        exact = torch.equal(value.to(dtype).float(), value)
        to = dtype if exact else torch.float32
        return torch.empty(value.shape if shape is None else shape, dtype=to, device="meta")


def _size(tensors: Tensors, meta: Mapping[str, object]) -> Size:
    return Size(sum(t.numel() for t in tensors.values()), blob_bytes(tensors, metadata(meta)))
