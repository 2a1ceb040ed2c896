"""The server's optimizers on the increments of G, against the papers' recursions in float64."""

from __future__ import annotations

import pytest
import torch
from oracles import ideal_change, mean, relative
from simulation import EXAMPLES, SITES, initial, settings, simulate
from test_checkpoint import same_state
from test_rounds import global_change

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.server_optimizer import ServerOptimizer
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.server import Server
from fedex_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from fedex_lora.runs.plan.traffic import DryRun

OPTIMIZERS = [
    ServerOptimizer("fedavgm", 0.7, 0.8),
    ServerOptimizer("fedadam", 0.05, 0.8, 0.9, 0.01),
    ServerOptimizer("fedyogi", 0.05, 0.8, 0.9, 0.01),
]
LEDGER = [n for n, m in METHODS.items() if m.residual == "exact" and m.exchanges and not m.pooled]
plain = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)


def trajectory(o, moves):
    """Where a tensor that the clients would move by `moves` is after every round."""
    x = m = torch.zeros_like(moves[0])
    v = torch.full_like(moves[0], o.tau**2)
    for d in moves:
        if o.name == "fedavgm":
            m = o.momentum * m + d
            x = x + o.learning_rate * m
        else:
            m = o.momentum * m + (1 - o.momentum) * d
            if o.name == "fedadam":
                v = o.beta2 * v + (1 - o.beta2) * d**2
            else:
                v = v - (1 - o.beta2) * d**2 * torch.sign(v - d**2)
            x = x + o.learning_rate * m / (v**0.5 + o.tau)
        yield x


@plain
@pytest.mark.parametrize("name", LEDGER)
def test_G_moves_by_the_optimizer_s_steps_and_clients_start_from_it(name, optimizer):
    s = settings(name, optimizer=optimizer, clients_per_round=3)
    states, clients, _ = simulate(s, 4)
    n = [[EXAMPLES[c] for c in moves] for moves in clients.history]
    for layer in SITES:
        ideal = [
            ideal_change(*zip(*((a.layers[layer], b.layers[layer]) for a, b in r.values())), w)  # type: ignore
            for r, w in zip(clients.history, n)
        ]
        for state, expected in zip(states[1:], trajectory(optimizer, ideal)):
            assert relative(global_change(state, s, layer), expected) < 1e-5
    heads = [
        mean([b.head["w"] - a.head["w"] for a, b in r.values()], w)
        for r, w in zip(clients.history, n)
    ]
    for state, expected in zip(states[1:], trajectory(optimizer, heads)):
        moved = state.head["w"].double() - initial(s).head["w"].double()
        assert relative(moved, expected) < 1e-5


@plain
@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora"])
def test_without_a_ledger_the_steps_are_of_the_averaged_factors(name, optimizer):
    s = settings(name, optimizer=optimizer)
    states, clients, _ = simulate(s, 4)
    for x in "AB":
        played = [r for r in range(4) if x in s.method.trained(r + 1)]
        start = getattr(states[0].factors["q"], x).double()
        moves = []
        for r in played:
            pairs = clients.history[r].values()
            drifts = [getattr(b.layers["q"], x) - getattr(a.layers["q"], x) for a, b in pairs]
            moves.append(mean(drifts, [EXAMPLES[c] for c in clients.history[r]]))
        for r, expected in zip(played, trajectory(optimizer, moves) if moves else ()):
            moved = getattr(states[r + 1].factors["q"], x).double() - start
            assert relative(moved, expected) < 1e-4
    assert not states[-1].ledger.entries


@plain
@pytest.mark.parametrize("name", ["fedex", "fedex-svd", "fedex-keep", "fedit"])
def test_a_run_that_goes_on_remembers(name, optimizer, tmp_path):
    s = settings(name, optimizer=optimizer, wire_dtype=torch.bfloat16)
    states, _, _ = simulate(s, 4)
    save_checkpoint(tmp_path, states[2], {})
    state, _ = load_checkpoint(tmp_path / "round-0002.safetensors")
    _, again, _ = simulate(s, 2)
    for expected in states[3:]:
        state, _ = run_round(state, s, again)
        same_state(state, expected)
        assert state.optimizer.keys() == expected.optimizer.keys() and state.optimizer
        assert all(torch.equal(t, expected.optimizer[n]) for n, t in state.optimizer.items())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in METHODS.items()
        if method.trains != "all" and not list(ServerOptimizer("fedavgm").problems(method, 1.0))
    ],
)
def test_messages_are_foretold_of_every_method_that_takes_one(name):
    s = settings(name, optimizer=ServerOptimizer("fedadam"), wire_dtype=torch.bfloat16)
    played = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    for record in simulate(s, 4)[2]:
        up, down = played.round()
        assert {c: x.bytes for c, x in down.items()} == record["bytes_down"]
        assert up.keys() == record["bytes_up"].keys()


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("fedex", {"server_learning_rate": 0.5}, "server_learning_rate: the server's optimizer"),
        ("flexlora", {}, "server_optimizer: has no increments"),
        ("fedsa", {}, "server_optimizer: has no increments"),
        ("local", {}, "server_optimizer: nothing is exchanged"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(name, options, why):
    with pytest.raises(UserError, match=f"^{why}"):
        Server(name, SITES, "ab", optimizer=ServerOptimizer("fedavgm"), **options)
