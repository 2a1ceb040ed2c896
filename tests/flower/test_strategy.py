"""FedExLora against a dense float64 oracle; its messages, its wrappers, and what it refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedex_lora.flower import FedExLora
from fedex_lora.flower import arrays as wire
from fedex_lora.flower.arrays import RESIDUAL, received
from flower.nodes import InProcess, failure, identity, reply, served  # noqa: F401
from flower.worlds import P, World, worlds

pytestmark = pytest.mark.usefixtures("identity")


@settings(max_examples=30)
@given(worlds(), st.integers(1, 4))
@example(World({"h.0.q": (1, 1, 1)}, [7, 18], 2.0, False, 10), 4)  # terms of 7 leave .003
def test_the_global_model_is_the_weighted_mean_of_where_the_clients_ended(world, rounds):
    found = FedExLora(world.config).start(world.grid(), world.initial(), num_rounds=rounds)
    assert world.close(world.change(found.arrays))
    w = torch.tensor(world.weights) / sum(world.weights)
    head = f"{P}classifier.weight"
    mean = sum(n * one[head] for n, one in zip(w, world.answers[-1]))
    torch.testing.assert_close(received(found.arrays)[0][head], mean, atol=1e-5, rtol=1e-5)


def test_clients_that_hardly_differ_are_exact_too(world):
    """Mean of products minus product of means would lose the residual's digits."""
    found = FedExLora(world.config).start(world.grid(spread=1e-3), world.initial(), num_rounds=2)
    tensors, base = received(found.arrays)
    for name, g in world.oracle().items():
        b, a = (tensors[f"{P}{name}.lora_{x}.weight"].double() for x in "BA")
        residual = g - world.scale(name) * b @ a
        error = torch.linalg.norm(base[name].dense().double() - residual)
        # B̄ and Ā are float32 themselves
        assert error <= 1e-7 * torch.linalg.norm(g) + 1e-5 * torch.linalg.norm(residual)


def test_a_client_that_holds_nothing_is_sent_all_of_it(world):
    """At every message, training's and evaluation's, the whole change is there."""
    grid, seen = world.grid(), []
    FedExLora(world.config).start(
        grid,
        world.initial(),
        num_rounds=3,
        evaluate_fn=lambda n, arrays: seen.append((n, world.change(arrays))),
    )
    assert len(grid.sent) == 3 * (3 + 3) and [n for n, _ in seen] == [0, 1, 2, 3]
    for message in grid.sent:
        round = int(message.content["config"]["server-round"])
        after = round - (message.metadata.message_type == "train")
        found = world.change(message.content)
        assert all(torch.equal(found[name], seen[after][1][name]) for name in found)
    assert world.close(seen[-1][1])


def test_the_residual_is_sent_at_its_rank_until_the_matrix_is_smaller(world):
    world = World({"q": (40, 50, 2)}, [1, 3, 1])
    grid = world.grid()
    FedExLora(world.config, fraction_evaluate=0.0).start(grid, world.initial(), num_rounds=8)
    ranks = []
    for message in grid.sent[::3]:
        delta = received(message.content)[1].get("q")
        ranks.append(0 if delta is None else "dense" if delta.right is None else delta.rank)
    # (k − 1)·r a round; of rank 22, factors hold 22·90 numbers, the matrix 2000
    assert ranks == [0, 4, 8, 12, 16, 20, "dense", "dense"]


def test_what_no_config_record_can_hold_is_an_array_record(world, monkeypatch):
    monkeypatch.setattr(wire, "MOST", 100)
    grid = world.grid()
    found = FedExLora(world.config).start(grid, world.initial(), num_rounds=2)
    assert world.close(world.change(found.arrays))
    assert world.close(world.change(grid.sent[-1].content))
    assert len(grid.sent[-1].content.array_records) == 2
    assert not grid.sent[-1].content["config"][RESIDUAL]


def test_a_run_goes_on_from_another_one_s_result(world):
    first = FedExLora(world.config).start(world.grid(), world.initial(), num_rounds=2)
    before = world.oracle()
    grid = world.grid()
    world.answers.clear()
    second = FedExLora(world.config)
    found = second.start(grid, first.arrays, num_rounds=1)
    old, old_base = received(first.arrays)
    left = {}
    for name, g in before.items():
        b, a = (old[f"{P}{name}.lora_{x}.weight"].double() for x in "BA")
        left[name] = g - world.scale(name) * b @ a
    assert world.close(world.change(found.arrays), left) and old_base


def test_truncated_to_a_rank_and_what_was_cut_off_comes_later(world):
    grid = world.grid()
    strategy = FedExLora(world.config, "fedex-svd", rank=1)
    found = strategy.start(grid, world.initial(), num_rounds=3)
    second = received(grid.sent[6].content)[1]
    assert {delta.rank for delta in second.values()} == {1}
    # the best rank 1 of the first round's residual
    world_one = World(world.layers, world.weights)
    world_one.answers = world.answers[:1]
    w = torch.tensor(world.weights).double() / sum(world.weights)
    for name, g in world_one.oracle().items():
        parts = [[one[f"{P}{name}.lora_{x}.weight"].double() for one in world.answers[0]]
                 for x in "BA"]  # fmt: skip
        mean_b, mean_a = (sum(n * t for n, t in zip(w, part)) for part in parts)
        u, s, vh = torch.linalg.svd(g - world.scale(name) * mean_b @ mean_a)
        best = s[0] * u[:, :1] @ vh[:1]
        torch.testing.assert_close(second[name].dense().double(), best, atol=1e-4, rtol=1e-4)
    assert world.close(world.change(found.arrays))  # the last round sends the rest


def test_without_a_residual_it_is_fedavg(world):
    grid = world.grid()
    found = FedExLora(world.config, "fedit").start(grid, world.initial(), num_rounds=2)
    tensors, base = received(found.arrays)
    w = torch.tensor(world.weights) / sum(world.weights)
    assert not base
    for name, tensor in tensors.items():
        mean = sum(n * one[name] for n, one in zip(w, world.answers[-1]))
        torch.testing.assert_close(tensor, mean, atol=1e-5, rtol=1e-5)


def test_ffa_leaves_a_as_it_was_whatever_clients_did_to_it(world):
    initial = world.initial()
    found = FedExLora(world.config, "ffa").start(world.grid(), initial, num_rounds=2)
    tensors, base = received(found.arrays)
    old = initial.to_torch_state_dict()
    assert not base
    assert all(torch.equal(t, old[name]) for name, t in tensors.items() if ".lora_A." in name)
    assert not torch.equal(tensors[f"{P}h.0.q.lora_B.weight"], old[f"{P}h.0.q.lora_B.weight"])


def test_arrival_decides_nothing(world):
    class Sorted(InProcess):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(messages, timeout=timeout)[::-1]

    found = []
    for kind in (InProcess, Sorted):
        grid = kind([])
        fresh = World(world.layers, world.weights)
        initial = fresh.initial()
        answers = [fresh.draw() for _ in world.weights]
        grid.clients = {
            7 + i: lambda m, n=n, answer=answer: reply(m, answer, num_examples=n)
            for i, (n, answer) in enumerate(zip(world.weights, answers))
        }
        strategy = FedExLora(world.config, fraction_evaluate=0.0)
        found.append(strategy.start(grid, initial, num_rounds=1).arrays.to_torch_state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- around it


def test_within_clipping_without_noise_it_is_itself(world):
    """A norm that is never reached; the wrapper calls the strategy's methods."""
    inner = FedExLora(world.config)
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1e9, 3)
    grid = world.grid()
    found = wrapper.start(grid, world.initial(), num_rounds=3)
    assert world.close(world.change(inner.whole(found.arrays)))
    assert len(grid.sent) == 18 and grid.sent[-1].content["config"][RESIDUAL]


def test_clipping_on_the_server_clips_what_is_averaged(world):
    """Every reply within norm 1 of what was sent, and the mean of the clipped ones exact."""
    inner = FedExLora(world.config)
    initial = world.initial()
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1.0, 3)
    found = wrapper.start(world.grid(), initial, num_rounds=1)
    start = initial.to_torch_state_dict()
    for i, answer in enumerate(world.answers[0]):
        norm = sum((answer[n].double() - start[n]).pow(2).sum() for n in start) ** 0.5
        clipped = {n: start[n] + (answer[n] - start[n]) * min(1, 1 / norm) for n in start}
        world.answers[0][i] = clipped
    assert world.close(world.change(inner.whole(found.arrays)))


def test_noise_on_the_server_is_not_undone_by_a_residual_without_noise(world, caplog):
    """Nothing leaves the server but the averages with their noise; a warning says so."""
    inner = FedExLora(world.config)
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.5, 10.0, 3)
    grid = world.grid()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = wrapper.start(grid, world.initial(), num_rounds=3)
    assert "method ffa" in caplog.text.lower()
    assert not any(received(message.content)[1] for message in grid.sent)
    assert not received(inner.whole(found.arrays))[1]


def test_ffa_loses_nothing_to_noise_on_the_server(world, caplog):
    """A stays; B is the mean with its noise, and that is what clients get."""
    initial = world.initial()
    inner = FedExLora(world.config, "ffa", fraction_evaluate=0.0)
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 1e-3, 1e9, 3)
    grid = world.grid()
    result = wrapper.start(grid, initial, num_rounds=2)
    assert "averages were changed" not in caplog.text
    sent, _ = received(grid.sent[-1].content)
    old, name = initial.to_torch_state_dict(), f"{P}h.0.q.lora_{{}}.weight".format
    assert torch.equal(sent[name("A")], old[name("A")])
    assert torch.equal(received(inner.whole(result.arrays))[0][name("A")], old[name("A")])
    w = torch.tensor(world.weights) / sum(world.weights)
    mean = sum(n * one[name("B")] for n, one in zip(w, world.answers[0]))
    noise = (sent[name("B")] - mean).std()  # 1e-3 · 1e9 / 3
    assert 0.5 < noise * 3e-6 < 2


def test_few_clients_are_told_what_they_give_away(world, caplog):
    for weights, warned in (([1, 2, 3], True), ([1, 2, 3, 4], False)):
        caplog.clear()
        few = World(world.layers, weights)
        FedExLora(few.config).start(few.grid(), few.initial(), num_rounds=1)
        assert ("others' factors" in caplog.text) == warned


def test_flower_s_mods_see_one_record_with_the_names_they_expect(world):
    """They answer an error to a second ArrayRecord or to other names."""
    for mod, wrap in (
        (LocalDpMod(1e9, 1e-9, 1.0, 1e-5), lambda s: s),
        (fixedclipping_mod, lambda s: DifferentialPrivacyClientSideFixedClipping(s, 0.0, 1e9, 3)),
    ):
        app = ClientApp(mods=[mod])
        fresh = World(world.layers, world.weights)
        inner = fresh.grid()

        @app.train()
        def train(message, context, inner=inner):
            return inner.clients[10 + int(context.node_config["partition-id"])](message)

        strategy = FedExLora(world.config, fraction_evaluate=0.0)
        grid = InProcess(served(app, 3, {}))
        found = wrap(strategy).start(grid, fresh.initial(), num_rounds=3)
        assert fresh.close(fresh.change(strategy.whole(_adapter(found.arrays))))


def _adapter(arrays: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({k: v for k, v in arrays.items() if ".residual_" not in k})
