"""How far rounds that are played from Python have come: a bar, or lines where there is no room
for one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from fedex_lora.federation.loop import Exchange, Transport
from fedex_lora.federation.messages import Lost, Scores, Update
from fedex_lora.runs.pace import Pace


class Barred:
    """A transport that shows how far its rounds are: tqdm's bar in a notebook and on a terminal,
    else, as in a file, a line for every round.

    Args:
        inner: What carries the messages.
        rounds: How many rounds there are to be.
        clients: Of a round.
    """

    def __init__(self, inner: Transport, rounds: int, clients: int) -> None:
        from tqdm.autonotebook import tqdm  # noqa: PLC0415 (only who asks for it needs it)
        from tqdm.std import tqdm as plain  # noqa: PLC0415

        self.inner, self.pace = inner, Pace(rounds, clients, 0, time.monotonic())
        self.bar = None
        if tqdm is not plain or sys.stderr.isatty():
            about = {"desc": f"round 1/{rounds}", "unit": "client", "dynamic_ncols": True}
            self.bar = tqdm(total=rounds * clients, **about)

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        losses: list[float] = []
        if self.bar is not None:
            self.bar.set_description(f"round {self.pace.done + 1}/{self.pace.rounds}")
        for done, reply in enumerate(self.inner.train(exchange), 1):
            if isinstance(reply, Update) and "loss" in reply.metrics:
                losses.append(reply.metrics["loss"])
            mean = sum(losses) / len(losses) if losses else None
            self.pace.turn("", done, len(exchange.clients), mean)
            if self.bar is not None:
                self.bar.set_postfix_str("" if mean is None else f"loss {mean:.3f}", refresh=False)
                self.bar.update()
            yield reply

    def evaluate(self, exchange: Exchange) -> Iterator[Scores | Lost]:
        yield from self.inner.evaluate(exchange)

    def round_done(self) -> None:
        """The round is aggregated."""
        if self.bar is None:
            print(self.pace.line(time.monotonic(), 200, bar=False), file=sys.stderr, flush=True)
        self.pace.round_done(self.pace.done + 1)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()
