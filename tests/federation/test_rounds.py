"""Several rounds of every method against a dense float64 oracle of the global model."""

from dataclasses import replace

import pytest
import torch
from oracles import dense64, ideal_change, mean, product, relative
from simulation import EXAMPLES, SITES, assert_same, initial, settings, simulate

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import Lost
from fedex_lora.federation.state import base_increment, begin, global_factors, start_of

EXCHANGING = [n for n, m in METHODS.items() if m.exchanges and m.trains != "all"]
EXACT = [
    n
    for n in EXCHANGING
    if METHODS[n].residual in ("exact", "zero") and METHODS[n].trains != "inner"
]  # test_fed_sb.py has that one's
PARTIAL = {"clients_per_round": 2}


def global_change(state, s, site):
    """G − W0 in float64, from what the server would broadcast or export."""
    total = state.ledger.total(site)
    change = (
        torch.zeros(SITES[site].out, SITES[site].inp).double() if total is None else total.double()
    )
    factors = global_factors(state, s)
    return change + product(factors[site]) if site in factors else change


def carried(state, site):
    return dense64(state.carry[site]) if site in state.carry else 0


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("extra", [{}, PARTIAL, {"server_learning_rate": 0.7}])
def test_the_global_model_is_the_weighted_mean_of_what_the_clients_learned(name, extra):
    s = settings(name, **extra)
    states, clients, _ = simulate(s)
    for site in SITES:
        ideal = torch.zeros(SITES[site].out, SITES[site].inp).double()
        for before, after, moves in zip(states, states[1:], clients.history):
            n = [EXAMPLES[c] for c in moves]
            starts = [start.layers[site] for start, _ in moves.values()]
            ends = [end.layers[site] for _, end in moves.values()]
            ideal = ideal + ideal_change(starts, ends, n, s.server_learning_rate)
            assert relative(global_change(after, s, site), ideal) < 1e-6
            assert before.version + 1 == after.version


@pytest.mark.parametrize("name", EXACT)
def test_every_client_starts_from_the_global_model(name):
    """base + s·BA = G, for clients that took part and for those that were away."""
    s = settings(name, **PARTIAL)
    for state in simulate(s)[0]:
        for client in s.clients:
            start = start_of(state, s, client)
            for site in SITES:
                base = global_change(state, s, site) - (
                    0 if s.method.shared_base else product(start.layers[site])
                )
                if s.method.shared_base:
                    factors = global_factors(state, s)
                    base = base - (product(factors[site]) if site in factors else 0)
                own = None if s.method.shared_base else start.layers[site]
                for fold in (True, False):
                    beyond = base_increment(state.ledger, site, own, fold)
                    placed = torch.zeros(1).double() if beyond is None else dense64(beyond)
                    g = global_change(state, s, site)
                    got = placed + product(start.layers[site])
                    if g.norm() > 0:
                        assert relative(got, g) < 1e-6


@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.parametrize("extra", [{}, PARTIAL, {"ranks": {"a": 1, "b": 3, "c": 2, "d": 3}}])
def test_what_is_sent_is_enough_to_restore_the_start_bit_for_bit(name, extra):
    """`Clients.train` compares what it receives with what the server believes."""
    if "ranks" in extra and not METHODS[name].ranks_may_differ:
        return
    states, clients, _ = simulate(settings(name, **extra))
    assert len(clients.history) == 5 and states[-1].version == 5


def test_after_one_round_all_exact_assignments_have_the_same_global_model():
    names = [n for n in EXCHANGING if METHODS[n].residual == "exact" and not METHODS[n].pooled]
    assert len(names) >= 4
    changes = {n: global_change(simulate(settings(n), 1)[0][1], settings(n), "q") for n in names}
    for n in names:
        assert relative(changes[n], changes["fedex"]) < 1e-6


@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_counted_bytes_are_those_of_the_messages(name, wire):
    unequal = {"a": 1, "b": 3, "c": 2, "d": 3} if METHODS[name].ranks_may_differ else {}
    for part, ranks in ((2, {}), (2, unequal), ("all", unequal)):
        given = settings(name, clients_per_round=part, wire_dtype=wire, ranks=ranks)
        _, clients, records = simulate(given)
        assert [r["bytes_down"] for r in records] == clients.down


@pytest.mark.parametrize("name", EXACT)
def test_half_as_wide_messages_take_about_half_the_bytes_and_do_not_grow(name):
    layers = {"q": LayerShape(out=256, inp=192, rank=4, scale=2.0)}
    down = {}
    for wire in (torch.float32, torch.bfloat16):
        _, clients, _ = simulate(settings(name, layers=layers, wire_dtype=wire, flush=False))
        down[wire] = [d["a"] for d in clients.down[2:]]
    for wide, narrow in zip(down[torch.float32], down[torch.bfloat16]):
        assert narrow < 0.9 * wide  # the residual takes along what rounding took off the factors


@pytest.mark.parametrize("name", EXCHANGING)
def test_the_order_of_arrival_is_irrelevant_bit_for_bit(name):
    s = settings(name)
    expected = simulate(s, 3)[0][-1]
    for arrive in (lambda r: r[::-1], lambda r: [r[2], r[0], r[2], r[3], r[1]]):
        got = simulate(s, 3, arrive=arrive)[0][-1]
        for client in s.clients:
            assert_same(start_of(got, s, client), start_of(expected, s, client))
        for site in SITES:
            totals = [x.ledger.total(site) for x in (got, expected)]
            assert totals[0] is totals[1] is None or torch.equal(*totals)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fedex-svd", "fedex"])
def test_what_was_sent_plus_what_is_carried_is_exact(name, wire):
    s = settings(name, wire_dtype=wire, flush=False)
    states, clients, records = simulate(s)
    ideal = torch.zeros(SITES["q"].out, SITES["q"].inp).double()
    for before, after, moves in zip(states, states[1:], clients.history):
        ends = [_as_received(start, end, wire) for start, end in moves.values()]
        starts = [start.layers["q"] for start, _ in moves.values()]
        ideal = ideal + ideal_change(
            starts, [e.layers["q"] for e in ends], [EXAMPLES[c] for c in moves]
        )
        assert relative(global_change(after, s, "q") + carried(after, "q"), ideal) < 2e-6
        if name == "fedex-svd":
            assert dense64(after.ledger.entries[-1][1]["q"]).shape == (26, 33)
            assert (
                torch.linalg.matrix_rank(
                    dense64(after.ledger.since(before.version).entries[0][1]["q"]), rtol=1e-5
                )
                == 2
                or wire != torch.float32
            )
    if name == "fedex-svd" or wire == torch.bfloat16:
        assert records[-1]["carry"] > 0 and records[-1]["sent"] > 0


def _as_received(start, end, wire):
    """A lossy wire rounds the drift."""
    if wire == torch.float32:
        return end

    def rounded(a, b):
        return a + (b - a).to(wire).float()

    return AdapterState(
        {
            n: Factors(rounded(f.A, end.layers[n].A), rounded(f.B, end.layers[n].B), f.scale)
            for n, f in start.layers.items()
        },
        {},
    )


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_the_last_round_flushes_the_carry(wire):
    states, _, records = simulate(settings("fedex-svd", wire_dtype=wire))
    assert states[-2].carry and not states[-1].carry and "carry" not in records[-1]


def test_without_carry_nothing_waits():
    states, _, _ = simulate(settings("fedex-svd", carry=False))
    assert all(not s.carry for s in states)


@pytest.mark.parametrize("name", EXCHANGING)
def test_a_frozen_factor_is_never_sent(name):
    s = settings(name)

    class Spy:
        def __init__(self, inner):
            self.inner, self.down = inner, []

        def train(self, exchange):
            self.down.append(exchange.message("a"))
            for update in self.inner.train(exchange):
                sent = {name.partition("/")[0] for name in update.tensors}
                trained = s.method.trained(update.round)
                assert sent == s.method.assignment.sent_up(trained) | {"head"}
                yield update

    _, clients, _ = simulate(s, 0)
    spy, state = Spy(clients), begin(s, initial(s))
    for _ in range(3):
        state, _ = run_round(state, s, spy)
    first, second = spy.down[:2]
    assert not first.tensors  # the start is a function of the seed
    assignment = s.method.assignment
    dealt = assignment.own if assignment.dealt else frozenset()
    for round, message in enumerate(spy.down[1:], 1):
        expected = s.method.sent_down(round) | dealt | {"head"}
        assert {name.partition("/")[0] for name in message.tensors} == expected
    assert second.fresh == (1 if assignment.drawn else None)


def test_local_exchanges_nothing_and_every_client_goes_its_own_way():
    s = settings("local")
    states, clients, records = simulate(s, 3)
    for client in s.clients:
        assert_same(start_of(states[-1], s, client), clients.history[-1][client][1])
        assert_same(clients.history[1][client][0], clients.history[0][client][1])
    assert not states[-1].ledger.entries
    assert not any(records[-1]["bytes_up"].values()) and not any(records[-1]["bytes_down"].values())


def test_full_fine_tuning_averages_all_parameters():
    s = settings("full", layers={})
    states, clients, _ = simulate(s, 2)
    moves = clients.history[-1]
    expected = mean([end.head["w"] for _, end in moves.values()], [EXAMPLES[c] for c in moves])
    torch.testing.assert_close(states[-1].head["w"].double(), expected, rtol=1e-6, atol=1e-6)


def test_uniform_weights():
    s = settings("fedit", weights="uniform")
    states, clients, records = simulate(s, 1)
    expected = mean([end.head["w"] for _, end in clients.history[0].values()], [1] * 4)
    torch.testing.assert_close(states[-1].head["w"].double(), expected, rtol=1e-6, atol=1e-6)
    assert records[0]["weights"] == dict.fromkeys("abcd", 0.25)


def test_starting_from_an_adapter_keeps_it_in_the_global_model():
    for name in ("fedex", "fedex-keep", "fedex-reinit", "fedex-hetero"):
        s = settings(name)
        g = torch.Generator().manual_seed(3)
        start = {
            n: replace(f, B=torch.randn(f.B.shape, generator=g))
            for n, f in initial(s).layers.items()
        }
        state = begin(s, AdapterState(start, initial(s).head))
        assert relative(global_change(state, s, "q"), product(start["q"])) < 1e-6
        _, clients, _ = simulate(s, 0)
        clients.held = {c: start_of(state, s, c) for c in s.clients}
        after, _ = run_round(state, s, clients)
        moves = clients.history[-1]
        change = ideal_change(
            [a.layers["q"] for a, _ in moves.values()],
            [b.layers["q"] for _, b in moves.values()],
            [EXAMPLES[c] for c in moves],
        )
        assert relative(global_change(after, s, "q"), product(start["q"]) + change) < 1e-6


def bad(kind):
    def spoil(update):
        if update.client != "b":
            return update
        sent = dict(update.tensors)
        if kind == "nan":
            sent["A/q"] = sent["A/q"] * float("nan")
        if kind == "shape":
            sent["A/q"] = sent["A/q"].T
        if kind == "missing":
            del sent["A/q"]
        if kind == "surplus":
            sent["A/zz"] = sent["A/q"]
        if kind == "dtype":
            sent["A/q"] = sent["A/q"].double()
        changed = replace(update, tensors=sent)
        if kind == "round":
            changed = replace(changed, round=9)
        if kind == "count":
            changed = replace(changed, examples=0)
        return Lost("b", "vanished") if kind == "lost" else changed

    return spoil


@pytest.mark.parametrize(
    "kind", ["nan", "shape", "missing", "surplus", "dtype", "round", "count", "lost"]
)
def test_a_bad_update_costs_itself_and_nothing_else(kind):
    s = settings("fedex")
    states, _, records = simulate(s, 1, breaks=bad(kind))
    assert sorted(records[0]["clients"]) == ["a", "c", "d"]
    assert list(records[0]["lost" if kind == "lost" else "refused"]) == ["b"]
    without = replace(s, clients=tuple("acd"))
    alone, _, _ = simulate(without, 1)
    for site in SITES:
        assert torch.equal(states[1].factors[site].A, alone[1].factors[site].A)
        assert torch.equal(states[1].ledger.total(site), alone[1].ledger.total(site))


def test_below_the_quorum_the_round_fails_and_says_why():
    with pytest.raises(QuorumLost, match=r"round 1: 3 valid updates.* 4.*b: .*NaN"):
        simulate(settings("fedex", min_clients=4), 1, breaks=bad("nan"))


def test_sampling_is_a_function_of_seed_and_round():
    s = settings("fedex", clients_per_round=2)
    assert [s.sample(r) for r in range(1, 9)] == [s.sample(r) for r in range(1, 9)]
    assert {tuple(s.sample(r)) for r in range(1, 30)} >= {("a", "b"), ("c", "d")}
    assert settings("fedex", clients_per_round=0.3).sample_size == 1
    assert LayerShape(4, 4, 4, 2.0).at_rank(1).scale == 8.0
