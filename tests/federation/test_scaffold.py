"""SCAFFOLD's control variates at the server, against the paper's sums in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import relative
from simulation import EXAMPLES, SITES, initial, settings, simulate
from test_checkpoint import same_state

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import flat
from fedex_lora.federation.server import Server
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from fedex_lora.runs.plan.traffic import DryRun

ABLE = [n for n, m in METHODS.items() if m.averages and m.exchanges and not m.pooled]


def fed(name, **options):
    layers = {"layers": {}} if METHODS[name].trains == "all" else {}
    return settings(name, scaffold=True, examples=EXAMPLES, **layers, **options)


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize(
    "extra",
    [{}, {"weights": "uniform", "clients_per_round": 2}, {"wire_dtype": torch.bfloat16}],
    ids=str,
)
def test_clients_begin_with_the_mean_of_all_variates_less_their_own(name, extra):
    s = fed(name, **extra)
    states, clients, records = simulate(s, 4)
    lossy = s.wire_dtype != torch.float32
    n = dict.fromkeys(EXAMPLES, 1) if s.weights == "uniform" else EXAMPLES
    own = {c: {k: 0 * t.double() for k, t in flat(initial(s)).items()} for c in s.clients}
    for round, played in enumerate(clients.history, start=1):
        mean = {k: sum(n[c] * own[c][k] for c in own) / sum(n.values()) for k in own["a"]}
        for client, (begun, end) in played.items():
            frozen = {f"A/{x}" for x in s.layers} if name == "ffa" else set()
            assert begun.variates.keys() == mean.keys() - frozen
            for k, got in begun.variates.items():
                wanted = mean[k] - own[client][k]
                assert (got - wanted).norm() <= (4e-6 if not lossy else 8e-2)
            trained = s.method.sent(round)
            for k, t in end.variates.items():
                if k.partition("/")[0] in trained:
                    own[client][k] = t.double()
    for client, kept in states[-1].variates.items():
        for k, t in kept.items():
            assert relative(t, own[client][k]) < (1e-2 if lossy else 1e-7)
    dry = DryRun(s, {k: t.shape for k, t in initial(s).head.items()})
    for record, down in zip(records, clients.down):
        assert record["bytes_down"] == down
        up, planned = dry.round()
        if not (lossy and name == "rolora"):  # zeros, which cross in half as many bytes
            assert {c: size.bytes for c, size in planned.items()} == down
        assert all(abs(up[c].bytes - b) < 1100 for c, b in record["bytes_up"].items())


def test_variates_do_not_touch_the_aggregate_or_the_norms():
    s = fed("fedex")
    with_variates, _, records = simulate(s, 1)
    plain, _, without = simulate(replace(s, scaffold=False), 1)
    same_state(replace(with_variates[-1], variates={}, variate={}, changed={}),
               replace(plain[-1], changed={}))  # fmt: skip
    assert records[0]["norms"] == without[0]["norms"]
    assert records[0]["bytes_up"]["a"] > 1.5 * without[0]["bytes_up"]["a"]


@pytest.mark.parametrize("name", ["fedex", "rolora"])
def test_a_run_that_goes_on_remembers_everybody_s_variates(name, tmp_path):
    s = fed(name, clients_per_round=3)
    states, _, _ = simulate(s, 4)
    save_checkpoint(tmp_path, states[2], {})
    state, _ = load_checkpoint(tmp_path / "round-0002.safetensors")
    same_state(state, states[2])
    assert state.variates
    _, again, _ = simulate(s, 2)
    for expected in states[3:]:
        state, _ = run_round(state, s, again)
        same_state(state, expected)


def test_a_client_that_joins_dilutes_the_mean():
    s = replace(fed("fedex"), weights="uniform", clients=("a", "b"))
    states, _, _ = simulate(s, 1)
    wider = replace(s, clients=("a", "b", "c"))
    for name, two in start_of(states[1], s, "c").variates.items():
        torch.testing.assert_close(start_of(states[1], wider, "c").variates[name], two * 2 / 3)
    assert not any(t.any() for t in start_of(begin(s, initial(s)), s, "a").variates.values())


def test_a_variate_that_is_far_larger_than_the_others_is_refused_with_its_update():
    def wild(update):
        factor = 30.0 if update.client == "b" else 1.0
        tensors = {n: t * factor if "variate" in n else t for n, t in update.tensors.items()}
        return replace(update, tensors=tensors)

    states, _, (record,) = simulate(fed("fedex", norm_ratio=10.0), 1, breaks=wild)
    assert list(record["refused"]) == ["b"] and "b" not in states[1].variates
    assert record["refused"]["b"].startswith("its control variates have a norm of ")
    _, _, (record,) = simulate(fed("fedex", norm_ratio=40.0), 1, breaks=wild)
    assert not record["refused"]


def test_a_variate_that_is_no_number_is_refused():
    s = fed("fedex")

    def spoiled(update):
        if update.client != "b":
            return update
        odd = {**update.tensors, "variate/A/q": update.tensors["variate/A/q"] * float("nan")}
        return replace(update, tensors=odd)

    _, _, (record,) = simulate(s, 1, breaks=spoiled)
    assert "NaN" in record["refused"]["b"] and "variate" in record["refused"]["b"]

    def without(update):
        kept = {n: t for n, t in update.tensors.items() if n != "variate/B/q"}
        return replace(update, tensors=kept) if update.client == "b" else update

    _, _, (record,) = simulate(s, 1, breaks=without)
    assert "is missing" in record["refused"]["b"]


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("fedsa", {}, "scaffold: variates are of factors that all clients share"),
        ("fedex-keep", {}, "scaffold: variates are of factors"),
        ("fedex-reinit", {}, "scaffold: variates are of factors"),
        ("local", {}, "scaffold: nothing is exchanged"),
        ("fedex", {"mean": "median", "liars": 1, "min_clients": 3}, "scaffold: .* median"),
        ("fedex", {"align": True}, "scaffold: align"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(name, options, why):
    with pytest.raises(UserError, match=f"^{why}"):
        Server(name, SITES, "abc", scaffold=True, **options)
