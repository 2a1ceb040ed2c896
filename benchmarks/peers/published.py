"""The round of the paper's published scripts, in their way (`benchmarks.published`)."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection

import transformers

from benchmarks.peers.common import Asked, Ended, bases, effective, serve
from benchmarks.published import PublishedRound
from benchmarks.rounds import MINILM
from fedex_lora.model.load import locate


def in_turn(connection: Connection, asked: Asked) -> None:
    """k + 1 copies of the model, every example padded, the residual by dense products."""
    serve(connection, rounds(asked))


def rounds(asked: Asked) -> Iterator[Ended]:
    """Each from where the last one ended."""
    auto = transformers.AutoModelForSequenceClassification
    peer = PublishedRound(asked.federation(), auto, locate(MINILM))
    own = bases(peer.server)
    while True:
        start = effective(own, peer.server.state_dict(), peer.scale)
        peer.round()
        ends = [effective(own, one.state_dict(), peer.scale) for one in peer.clients]
        own = bases(peer.server)
        got = effective(own, peer.server.state_dict(), peer.scale)
        yield Ended(start, ends, [len(rows) for rows in peer.rows], {"": got})
