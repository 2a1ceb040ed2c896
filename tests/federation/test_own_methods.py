"""What holds for every method holds for methods that others write, in one file each."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_aggregate
import test_checkpoint
import test_rounds
import test_tree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import mean, trained_by
from own_methods import NAMES, registered
from simulation import EXAMPLES, SITES, initial, simulate
from simulation import settings as federation
from torch.testing import assert_close

from fedex_lora.aggregation.assignment import Average
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.methods import METHODS, Method
from fedex_lora.engines.turn import Trained, Turn, take_turns
from fedex_lora.errors import UserError
from fedex_lora.federation.server import Server
from fedex_lora.federation.state import begin, start_of

WIRES = [torch.float32, torch.bfloat16]
SETTINGS = [{}, test_rounds.PARTIAL, {"server_learning_rate": 0.7}]
LAWS = {
    test_rounds.test_what_is_sent_is_enough_to_restore_the_start_bit_for_bit: SETTINGS,
    test_rounds.test_counted_bytes_are_those_of_the_messages: WIRES,
    test_rounds.test_the_order_of_arrival_is_irrelevant_bit_for_bit: [],
    test_rounds.test_a_frozen_factor_is_never_sent: [],
}
OF_EXACT_ONES = {
    test_rounds.test_the_global_model_is_the_weighted_mean_of_what_the_clients_learned: SETTINGS,
    test_rounds.test_every_client_starts_from_the_global_model: [],
}


@pytest.fixture(autouse=True, scope="module")
def _own():
    with registered():
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", [*LAWS, *OF_EXACT_ONES], ids=lambda law: law.__name__[5:40])
def test_laws_of_rounds(name, law):
    if law in OF_EXACT_ONES and METHODS[name].residual != "exact":
        return
    for argument in {**LAWS, **OF_EXACT_ONES}[law] or [None]:
        law(name) if argument is None else law(name, argument)


@pytest.mark.parametrize("law", [
    test_aggregate.test_assigned_plus_residual_is_ideal,
    test_aggregate.test_deviation_is_what_plain_averaging_misses,
])  # fmt: skip
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(1, 1000), min_size=1, max_size=7),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
)
def test_laws_of_an_aggregate(law, name, n, seed, eta):
    law.hypothesis.inner_test(name, n, seed, eta, 1)  # pyright: ignore


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NAMES),
    test_tree.trees.filter(lambda tree: any(True for _ in test_tree.clients_of(tree))),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
)
def test_a_tree_of_servers_comes_to_the_aggregate_of_all_clients(name, tree, seed, eta):
    law = test_tree.test_a_tree_of_servers_comes_to_the_aggregate_of_all_clients
    law.hypothesis.inner_test(name, tree, seed, eta, 1)  # pyright: ignore


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [{}, {"wire_dtype": torch.bfloat16}, test_rounds.PARTIAL])
def test_four_rounds_are_two_and_two_more(name, extra, tmp_path):
    test_checkpoint.test_four_rounds_are_two_and_two_more_bit_for_bit(name, extra, tmp_path)


@pytest.mark.parametrize("wire", WIRES)
def test_fedsa_averages_A_and_leaves_B_with_its_client(wire):
    s = federation("own-fedsa", clients_per_round=2, wire_dtype=wire, flush=False)
    states, clients, records = simulate(s)
    own = {c: torch.zeros(26, 3) for c in s.clients}  # B = 0 in the beginning
    late = torch.zeros(3, 33).double()  # what rounding took off what was sent
    for state, moves in zip(states[1:], clients.history):
        starts = {c: start.layers["q"] for c, (start, _) in moves.items()}
        for client, start in starts.items():
            assert torch.equal(start.B, own[client])
        drifts = [(end.layers["q"].A - starts[c].A).to(wire) for c, (_, end) in moves.items()]
        ends = [starts[c].A + drift.float() for c, drift in zip(moves, drifts)]
        ideal = mean(ends, [EXAMPLES[c] for c in moves]) + late
        after = state.factors["q"].A.double()
        assert_close(after, ideal, rtol=2**-8 if wire == torch.bfloat16 else 1e-6, atol=1e-6)
        late = ideal - after if wire == torch.bfloat16 else late
        own |= {c: end.layers["q"].B for c, (_, end) in moves.items()}
        for client in s.clients:
            f = start_of(state, s, client).layers["q"]
            assert torch.equal(f.B, own[client]) and torch.equal(f.A, state.factors["q"].A)
    assert late.abs().max() < 0.01
    assert not any(state.ledger.entries for state in states)
    assert not any("deviation" in record for record in records)


def test_a_factor_that_is_kept_is_looked_at_before_the_run_goes_on_from_it():
    def spoiled(update):
        kept = {name: t * float("nan") for name, t in update.kept.items()}
        return update if update.client != "b" else replace(update, kept=kept)

    _, _, records = simulate(federation("own-fedsa"), 1, breaks=spoiled)
    assert "NaN" in records[0]["refused"]["b"] and sorted(records[0]["clients"]) == list("acd")


def test_a_server_for_other_frameworks_leaves_B_with_the_client():
    server = Server("own-fedsa", SITES, ["a", "b"])
    state, g = server.init(), torch.Generator().manual_seed(0)
    updates = {}
    for _ in range(3):
        starts = {c: server.start(state, c) for c in "ab"}
        ends = {c: trained_by(start, frozenset("AB"), g, 0.1) for c, start in starts.items()}
        updates = {c: server.update(state, c, end, EXAMPLES[c]) for c, end in ends.items()}
        assert {n[0] for update in updates.values() for n in update.tensors} == {"A"}
        state, _ = server.step(state, updates)
        for c, end in ends.items():
            assert torch.equal(server.start(state, c).layers["q"].B, end.layers["q"].B)
        a = mean([end.layers["q"].A for end in ends.values()], [EXAMPLES[c] for c in "ab"])
        assert_close(state.factors["q"].A.double(), a, rtol=1e-6, atol=1e-6)
    elsewhere = {c: replace(update, kept={}) for c, update in updates.items()}
    there, _ = server.step(server.init(), {c: replace(u, round=1) for c, u in elsewhere.items()})
    assert not there.own
    with pytest.raises(UserError, match="method 'given': its assignment: private is about own"):
        Server(Method("both", type("Odd", (Average,), {"private": True})(), "dropped", "x"), SITES)


def test_what_stays_with_a_client_is_neither_clipped_nor_noised():
    s = federation("own-fedsa")
    start = start_of(begin(s, initial(s)), s, "a")
    end = trained_by(start, frozenset("AB"), torch.Generator().manual_seed(0), 0.1)
    turn = Turn("a", 1, range(5), start, frozenset("AB"), 0)  # type: ignore[arg-type]

    def silent(drift, turn):
        assert {name.partition("/")[0] for name in drift} == {"A", "head"}
        return {name: 0 * value for name, value in drift.items()}

    (update,) = take_turns(
        SimpleNamespace(place=lambda *_: None, model=None),  # type: ignore[arg-type]
        lambda model, turns: [Trained(end=end)],  # type: ignore[arg-type]
        [turn],
        Ledger(),
        s,
        silent,
    )
    assert torch.equal(update.tensors["A/q"], start.layers["q"].A) and "B/q" not in update.tensors
    assert torch.equal(update.kept["B/q"], end.layers["q"].B)
