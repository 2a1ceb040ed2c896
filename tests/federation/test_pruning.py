"""Ranks that shrink: whose, by how much, what is dropped, and that everybody comes to the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from oracles import mean, product
from simulation import SITES, Clients, initial, settings
from test_checkpoint import same_state

from fedex_lora.aggregation.adapter import Factors, LayerShape
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.pruning import Pruning
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import AdapterState, flat
from fedex_lora.federation.server import Server
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.checkpoint import load_checkpoint, save_checkpoint

LAYERS = {name: shape.at_rank(6) for name, shape in SITES.items()}
HALF = METHODS["hetlora"].with_options({"decay": 0.5})


def shrunk(end, client, round):
    """The last rows of client a small in every round, of c in round 2, of the others large."""
    by = 1e-3 if client == "a" or (client, round) == ("c", 2) else 10.0
    found = {}
    for name, f in end.layers.items():
        kept = f.rank // 2
        a, b = f.A.clone(), f.B.clone()
        a[kept:], b[:, kept:] = by * a[kept:], by * b[:, kept:]
        found[name] = Factors(a, b, f.scale)
    return replace(end, layers=found)


class Shrinking(Clients):
    def _train(self, client, round, start):
        update = super()._train(client, round, start)
        begun, end = self.history[-1][client]
        end = shrunk(end, client, round)
        self.history[-1][client] = begun, end
        return replace(update, tensors=flat(end))


def played(rounds, state=None, **options):
    ranks = {"a": 6, "b": 4, "c": 5, "d": 6}
    s = replace(settings("hetlora", layers=LAYERS, ranks=ranks, **options), method=HALF)
    state = state or begin(s, initial(s))
    clients = Shrinking(s, {c: start_of(state, s, c) for c in s.clients})
    states, records = [state], []
    for _ in range(rounds):
        state, record = run_round(state, s, clients)
        states.append(state)
        records.append(record)
    return s, states, clients, records


def test_whose_last_rows_became_smaller_comes_down_and_brings_the_rest():
    _, states, clients, records = played(4)
    # in round 1 B is zero, so nothing can become smaller; a: 6 → 3 → 1, and stays there
    assert [r["ranks"] for r in records] == [
        {"a": 6, "b": 4, "c": 5, "d": 6},
        {"a": 3, "b": 4, "c": 2, "d": 6},
        {"a": 1, "b": 4, "c": 2, "d": 6},
        {"a": 1, "b": 4, "c": 2, "d": 6},
    ]
    for before, after, r, round in zip(records, records[1:], clients.history[1:], (1, 2, 3)):
        for name in SITES:
            ends, norms = [], []
            for client, (begun, end) in r.items():
                f, kept = end.layers[name], after["ranks"][client]
                assert f.rank == begun.layers[name].rank == before["ranks"][client]
                assert f.scale == pytest.approx(LAYERS[name].scale * 6 / f.rank)
                dropped = Factors(f.A[:kept], f.B[:, :kept], f.scale)
                b = torch.nn.functional.pad(dropped.B.double() * f.scale, (0, 6 - kept))
                a = torch.nn.functional.pad(dropped.A.double(), (0, 0, 0, 6 - kept))
                ends.append((b, a))
                norms.append(product(dropped).norm())
            got = states[round + 1].factors[name]
            for x, wanted in zip((got.B * got.scale, got.A), zip(*ends)):
                torch.testing.assert_close(x.double(), mean(wanted, norms), rtol=1e-5, atol=1e-6)
    sizes = [records[i]["bytes_down"] for i in (1, 2, 3)]
    assert sizes[0]["a"] > sizes[1]["a"] > sizes[2]["a"] and sizes[0]["b"] == sizes[2]["b"]
    assert [r["bytes_down"] for r in records] == clients.down


@pytest.mark.parametrize("options", [{}, {"clients_per_round": 3}])
def test_a_run_goes_on_with_the_ranks_that_are_left(options, tmp_path):
    _, states, _, _ = played(4, **options)
    save_checkpoint(tmp_path, states[2], {})
    state, _ = load_checkpoint(tmp_path / "round-0002.safetensors")
    assert state.ranks == states[2].ranks and state.ranks
    _, again, _, _ = played(2, state, **options)
    for state, expected in zip(again[1:], states[3:]):
        same_state(state, expected)
        assert state.ranks == expected.ranks


def test_the_penalty_s_gradient_is_that_of_the_norms_of_the_last_rows():
    g = torch.Generator().manual_seed(0)
    pruning = Pruning(0.7, 0.0)
    a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 5), (3, 4)))
    for t in (a, b):
        t.requires_grad_()
    (a[2:].norm() * b[:, 2:].norm()).backward()  # ⌊0.7·4⌋ = 2
    got = pruning.gradients(a.detach(), b.detach())
    torch.testing.assert_close(got[0], a.grad)
    torch.testing.assert_close(got[1], b.grad)
    s = pruning.size({"q": Factors(a.detach(), b.detach(), 3.0)})
    assert s == pytest.approx((a[2:].norm() * b[:, 2:].norm()).item())
    still = pruning.gradients(a.detach(), torch.zeros(3, 4).double())
    assert not still[0].any() and torch.isfinite(still[1]).all()
    one = Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    assert not pruning.prunes({"q": one}, {"q": one})  # nothing is left to drop


def test_what_it_does_not_go_with_is_refused_by_name():
    odd = {**SITES, "w": LayerShape(4, 4, 2, 1.0, fixed_rank=True)}
    with pytest.raises(UserError, match=r"^method.options.decay: .* leave lora.rank_pattern out"):
        Server(HALF, odd, "ab")
    Server("hetlora", odd, "ab")
    for options, why in (({"decay": 0.0}, "above 0 and at most 1"), ({"penalty": -1.0}, "finite")):
        with pytest.raises(UserError, match=f"^method.options.{min(options)}: .*{why}"):
            METHODS["hetlora"].with_options(options)


def test_a_server_alone_takes_updates_at_the_rank_it_sent():
    server = Server(HALF, LAYERS, "ab", seed=1)
    state, record = server.init(), {}
    for _ in range(2):
        ends = {}
        for client in "ab":
            start = server.start(state, client)
            kept = {
                n: Factors(f.A + 0.1, f.B + 0.1 if not state.version else f.B * 0.1, f.scale)
                for n, f in start.layers.items()
            }
            ends[client] = server.update(state, client, AdapterState(kept), examples=1)
        state, record = server.step(state, ends)
    assert record["ranks"] == {"a": 3, "b": 3} and json.dumps(record)
    assert {f.rank for f in server.start(state, "a").layers.values()} == {3}
