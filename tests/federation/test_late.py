"""Asynchronous rounds: late updates in G from where they started, against dense float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import product, relative
from simulation import EXAMPLES, SITES, initial, settings, simulate
from test_checkpoint import same_state
from test_rounds import global_change

from fedex_lora.aggregation.asynchronous import Asynchronous
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.server_optimizer import ServerOptimizer
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import Lost, Update, flat, only
from fedex_lora.federation.server import Server
from fedex_lora.runs.checkpoint import load_checkpoint, save_checkpoint

EXACT = [
    n
    for n, m in METHODS.items()
    if m.residual == "exact" and m.shared_base and m.exchanges and not m.pooled
]
HALF = Asynchronous(staleness=2, exponent=0.7, delay=0.5)


def moves(s, clients, records, exponent):
    """By round, what G and the head are to move by: all that is taken, each from its own start."""
    for round, record in enumerate(records, start=1):
        taken = [(round, c) for c in record["clients"]]
        taken += [(late["round"], late["client"]) for late in record["late"].values()]
        u = [
            (1 if s.weights == "uniform" else EXAMPLES[c]) * (1 + round - r) ** -exponent
            for r, c in taken
        ]
        pairs = [clients.history[r - 1][c] for r, c in taken]
        layers = {
            n: sum(
                w / sum(u) * (product(end.layers[n]) - product(start.layers[n]))
                for w, (start, end) in zip(u, pairs)
            )
            for n in SITES
        }
        head = sum(
            w / sum(u) * (end.head["w"].double() - start.head["w"].double())
            for w, (start, end) in zip(u, pairs)
        )
        yield layers, head, dict(zip(taken, u))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"weights": "uniform", "server_learning_rate": 0.6},
        {"clients_per_round": 3},
    ],
    ids=str,
)
def test_G_moves_by_every_update_from_the_version_it_started_from(name, extra):
    s = settings(name, asynchronous=HALF, min_clients=1, **extra)
    if METHODS[name].ranks_may_differ:
        s = replace(s, ranks={"a": 1, "b": 3, "c": 2, "d": 3})
    states, clients, records = simulate(s, 6)
    late = [x for record in records for x in record["late"].values()]
    assert len(late) > 2
    eta = s.server_learning_rate
    at, expected = 0.0, dict.fromkeys(SITES, 0.0)
    for state, record, (layers, head, u) in zip(
        states[1:], records, moves(s, clients, records, HALF.exponent)
    ):
        for n in SITES:
            expected[n] = expected[n] + eta * layers[n]
            assert relative(global_change(state, s, n), expected[n]) < 1e-6
        at = at + eta * head
        assert relative(state.head["w"], initial(s).head["w"].double() + at) < 1e-6
        weights = [*record["weights"].values(), *(x["weight"] for x in record["late"].values())]
        assert weights == pytest.approx([x / sum(u.values()) for x in u.values()])


def test_a_busy_client_is_not_asked_and_no_update_is_lost_or_taken_twice():
    s = settings("fedex", asynchronous=Asynchronous(2, 0.5, delay=1.0), min_clients=1)
    states, clients, records = simulate(s, 6)
    made = {(r, c) for r, played in enumerate(clients.history, start=1) for c in played}
    taken = [(r["round"], c) for r in records for c in r["clients"]]
    taken += [(x["round"], x["client"]) for r in records for x in r["late"].values()]
    waits = {(p.update.round, c) for c, p in states[-1].pending.items()}
    assert len(taken) == len(set(taken)) and {*taken} | waits == made and not {*taken} & waits
    for round, record in enumerate(records, start=1):
        away = {c for c, p in states[round - 1].pending.items()}
        assert not away & clients.history[round - 1].keys() and record["clients"]
        assert all(round - x["round"] <= 2 for x in record["late"].values())
    assert all(len(state.past) <= 2 for state in states)


@pytest.mark.parametrize("name", ["fedex", "fedex-svd", "fedex-reinit"])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_with_what_was_under_way(name, wire, tmp_path):
    s = settings(name, asynchronous=HALF, wire_dtype=wire)
    states, _, _ = simulate(s, 5)
    at = next(i for i, state in enumerate(states) if state.pending and i > 1)
    save_checkpoint(tmp_path, states[at], {})
    state, _ = load_checkpoint(tmp_path / f"round-{at:04d}.safetensors")
    same_state(state, states[at])
    assert {c: p.due for c, p in state.pending.items()} == {
        c: p.due for c, p in states[at].pending.items()
    }
    _, again, _ = simulate(s, at)
    for expected in states[at + 1 :]:
        state, _ = run_round(state, s, again)
        same_state(state, expected)


def test_what_truncation_cuts_of_a_late_update_is_carried():
    s = settings("fedex-svd", asynchronous=HALF)
    states, clients, records = simulate(s, 5)
    total = {n: sum(m[0][n] for m in moves(s, clients, records, 0.7)) for n in SITES}
    for n in SITES:  # the last round sends all that waited
        assert relative(global_change(states[-1], s, n), total[n]) < 1e-5


def test_a_server_optimizer_takes_late_updates_as_part_of_the_move():
    optimizer = ServerOptimizer("fedavgm", 0.7, 0.8)
    s = settings("fedex", asynchronous=HALF, optimizer=optimizer)
    states, clients, records = simulate(s, 5)
    m, x = 0.0, 0.0
    for state, (layers, _, _) in zip(states[1:], moves(s, clients, records, 0.7)):
        m = 0.8 * m + layers["q"]
        x = x + 0.7 * m
        assert relative(global_change(state, s, "q"), x) < 1e-5


class Belated:
    """A transport that brings an update of the round before, as one over a network does."""

    def __init__(self, inner):
        self.inner, self.kept = inner, None

    def train(self, exchange):
        kept, self.kept = self.kept, None
        if kept is not None:
            yield kept
        for reply in self.inner.train(exchange):
            if reply.client == "b" and exchange.round == 1:
                self.kept = reply
                yield Lost("b", "no reply within 1 s")
            else:
                yield reply


def test_an_update_that_a_transport_brings_late_is_checked_and_taken():
    s = settings("fedex", asynchronous=Asynchronous(1, 0.5))
    start, clients, _ = simulate(s, 0)
    state, first = run_round(start[0], s, belated := Belated(clients))
    after, record = run_round(state, s, belated)
    assert "b" in first["lost"] and list(record["late"]) == ["b, round 1"]
    assert sorted(record["clients"]) == ["a", "b", "c", "d"]
    _, (layers, _, _) = moves(s, clients, [first, record], 0.5)
    got = global_change(after, s, "q") - global_change(state, s, "q")
    assert relative(got, layers["q"]) < 1e-5
    sent = only(flat(clients.history[0]["b"][1]), {"A", "B", "head"})
    spoiled = {n: t * float("nan") for n, t in sent.items()}
    plain = replace(s, asynchronous=None)
    for tensors, how, why in ((spoiled, s, "NaN"), (sent, plain, "expected round 2")):
        belated.kept = Update(1, "b", tensors, EXAMPLES["b"])
        refused = run_round(state, how, belated)[1]["refused"]
        assert any(why in text for text in refused.values()), refused


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("fedit", {}, "a late update is added through the ledger"),
        ("fedex-keep", {}, "a late update is added through the ledger"),
        ("florist", {}, "a late update is added through the ledger"),
        ("local", {}, "nothing is exchanged"),
        ("fedex", {"mean": "median", "liars": 1, "min_clients": 3}, "median compares"),
        ("fedex", {"scaffold": True}, "control variates of a start that is gone"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(name, options, why):
    with pytest.raises(UserError, match=f"^asynchronous: {why}"):
        Server(name, SITES, "abc", asynchronous=Asynchronous(), **options)
