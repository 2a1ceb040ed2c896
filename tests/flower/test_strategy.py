"""FedExLora against a dense float64 oracle; its messages, its wrappers, and what it refuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from fedex_lora.errors import UserError
from fedex_lora.flower import FedExLora
from fedex_lora.flower import arrays as wire
from fedex_lora.flower.arrays import RESIDUAL, received
from flower.nodes import InProcess, failure, identity, reply, served  # noqa: F401

pytestmark = pytest.mark.usefixtures("identity")
P = "base_model.model."
Tensors = dict[str, torch.Tensor]


@dataclass
class World:
    """Layers by (out, in, r), and clients that answer with random factors of them."""

    layers: Mapping[str, tuple[int, int, int]]
    weights: list[int]
    alpha: float = 6.0
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.answers: list[list[Tensors]] = []  # by round, by client

    @property
    def config(self) -> LoraConfig:
        ranks = {name: r for name, (_, _, r) in self.layers.items()}
        return LoraConfig(
            r=99,
            lora_alpha=self.alpha,
            rank_pattern=ranks,
            use_rslora=self.rslora,  # type: ignore
        )

    def scale(self, layer: str) -> float:
        rank = self.layers[layer][2]
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def draw(self, b: float = 1.0, spread: float = 1.0, like: Tensors | None = None) -> Tensors:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self.random)

        found = {}
        for name, (out, inp, r) in self.layers.items():
            found[f"{P}{name}.lora_A.weight"] = normal(r, inp) * spread
            found[f"{P}{name}.lora_B.weight"] = normal(out, r) * spread * b
        found[f"{P}classifier.weight"] = normal(2, 3) * spread
        return found if like is None else {name: t + like[name] for name, t in found.items()}

    def initial(self) -> ArrayRecord:
        return ArrayRecord(self.draw(b=0.0))  # type: ignore[arg-type]

    def grid(self, spread: float = 1.0) -> InProcess:
        def client(i: int):
            def answer(message: Message) -> Message:
                if message.metadata.message_type == "evaluate":
                    return reply(message, {}, num_examples=1, loss=0.0)
                start, _ = received(message.content)
                update = self.draw(spread=spread, like=start)
                round = int(message.content["config"]["server-round"])  # type: ignore[index]
                while len(self.answers) < round:
                    self.answers.append([{}] * len(self.weights))
                self.answers[round - 1][i] = update
                return reply(message, update, num_examples=self.weights[i])

            return answer

        return InProcess(client(i) for i in range(len(self.weights)))

    def oracle(self) -> dict[str, torch.Tensor]:
        """G − W0 in float64: each round the mean of where clients ended, the base being what the
        averages left of the G before."""
        w = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        found = {}
        for name, (out, inp, _) in self.layers.items():
            base = g = torch.zeros(out, inp, dtype=torch.float64)
            for answers in self.answers:
                ends = [(one[f"{P}{name}.lora_B.weight"].double(),
                         one[f"{P}{name}.lora_A.weight"].double()) for one in answers]  # fmt: skip
                g = sum(n * (base + self.scale(name) * b @ a) for n, (b, a) in zip(w, ends))
                mean_b = sum((n * b for n, (b, _) in zip(w, ends)), torch.zeros(()))
                mean_a = sum((n * a for n, (_, a) in zip(w, ends)), torch.zeros(()))
                base = g - self.scale(name) * mean_b @ mean_a
            found[name] = g
        return found

    def change(self, arrays: ArrayRecord | RecordDict) -> dict[str, torch.Tensor]:
        """T + s·B·A of what a client or a server receives."""
        tensors, base = received(arrays)
        found = {}
        for name, (out, inp, _) in self.layers.items():
            b, a = (tensors[f"{P}{name}.lora_{x}.weight"].double() for x in "BA")
            t = base[name].dense().double() if name in base else torch.zeros(out, inp)
            found[name] = t + self.scale(name) * b @ a
        return found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.linalg.norm(found[n] - e) <= 1e-5 * torch.linalg.norm(e) for n, e in expected.items()
    )


@st.composite
def worlds(draw) -> World:
    sizes = draw(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=3))
    layers = {f"h.{i}.q": (out, inp, r) for i, (out, inp, r) in enumerate(sizes)}
    weights = draw(st.lists(st.integers(1, 50), min_size=2, max_size=5))
    return World(layers, weights, draw(st.sampled_from([2.0, 7.0])), draw(st.booleans()),
                 draw(st.integers(0, 99)))  # fmt: skip


@settings(max_examples=30)
@given(worlds(), st.integers(1, 4))
def test_the_global_model_is_the_weighted_mean_of_where_the_clients_ended(world, rounds):
    found = FedExLora(world.config).start(world.grid(), world.initial(), num_rounds=rounds)
    assert close(world.change(found.arrays), world.oracle())
    w = torch.tensor(world.weights) / sum(world.weights)
    head = f"{P}classifier.weight"
    mean = sum(n * one[head] for n, one in zip(w, world.answers[-1]))
    torch.testing.assert_close(received(found.arrays)[0][head], mean, atol=1e-5, rtol=1e-5)


@pytest.fixture
def world() -> World:
    """Unequal weights, out ≠ in ≠ r, scale ≠ 1."""
    return World({"h.0.q": (20, 31, 3), "h.0.v": (17, 20, 2)}, [1, 5, 2])


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
    assert close(seen[-1][1], world.oracle())


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
    assert close(world.change(found.arrays), world.oracle())
    assert close(world.change(grid.sent[-1].content), world.oracle())
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
    expected = {}
    for name, g in before.items():
        b, a = (old[f"{P}{name}.lora_{x}.weight"].double() for x in "BA")
        expected[name] = world.oracle()[name] + g - world.scale(name) * b @ a
    assert close(world.change(found.arrays), expected) and old_base


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
    assert close(world.change(found.arrays), world.oracle())  # the last round sends the rest


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
    assert close(world.change(inner.whole(found.arrays)), world.oracle())
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
    assert close(world.change(inner.whole(found.arrays)), world.oracle())


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
        assert close(fresh.change(strategy.whole(_adapter(found.arrays))), fresh.oracle())


def _adapter(arrays: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({k: v for k, v in arrays.items() if ".residual_" not in k})


# --- bad input


def answers(world: World, change) -> InProcess:
    """Client 11 does to its reply what `change` says."""
    grid = world.grid()
    honest = grid.clients[11]

    def changed(message: Message) -> Message:
        sent = honest(message)
        return change(message, sent) if message.metadata.message_type == "train" else sent

    grid.clients[11] = changed
    return grid


def other_tensors(change):
    def changed(message, sent):
        tensors = sent.content["arrays"].to_torch_state_dict()
        change(tensors)
        return reply(message, tensors, num_examples=5)

    return changed


Q = f"{P}h.0.q.lora_"


def _rank(t):
    t[f"{Q}A.weight"], t[f"{Q}B.weight"] = torch.ones(4, 31), torch.ones(20, 4)


def _nan(t):
    t[f"{Q}B.weight"][3, 1] = torch.nan


BAD = {
    "another rank": (other_tensors(_rank), "shape (4, 31); expected (3, 31)"),
    "a name is missing": (
        other_tensors(lambda t: t.pop(f"{Q}A.weight")),
        "lora_A.weight' is missi",
    ),
    "another name": (other_tensors(lambda t: t.update({"x": torch.ones(1)})), "'x' was not sent"),
    "NaN": (other_tensors(_nan), "lora_B.weight' has an entry of nan"),
    "no num-examples": (
        lambda m, s: reply(m, s.content["arrays"].to_torch_state_dict(), loss=1.0),
        "no 'num-examples'; expected the number of rows",
    ),
    "none": (
        lambda m, s: reply(m, s.content["arrays"].to_torch_state_dict(), num_examples=0),
        "num-examples is 0; expected a positive number",
    ),
    "no arrays": (
        lambda m, s: Message(RecordDict({"m": MetricRecord({"num-examples": 1})}), reply_to=m),
        "0 ArrayRecords; expected exactly one",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_reply_that_cannot_be_aggregated_is_named(world, what, caplog):
    """With the others the round goes on; without enough of them the run ends."""
    change, told = BAD[what]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        found = FedExLora(world.config).start(answers(world, change), world.initial(), num_rounds=1)
    assert "node 11: " in caplog.text and told in caplog.text
    del world.answers[0][1]
    world.weights = [1, 2]
    assert close(world.change(found.arrays), world.oracle())

    strict = FedExLora(world.config, min_train_nodes=3)
    with pytest.raises(UserError, match="min_train_nodes is 3") as error:
        fresh = World(world.layers, [1, 5, 2])
        strict.start(answers(fresh, change), fresh.initial(), num_rounds=1)
    assert "node 11: " in str(error.value) and told in str(error.value)


def test_a_client_that_fails_is_left_out_as_in_fedavg(world):
    grid = answers(world, lambda message, sent: failure(message, "out of memory"))
    found = FedExLora(world.config).start(grid, world.initial(), num_rounds=1)
    del world.answers[0][1]
    world.weights = [1, 2]
    assert close(world.change(found.arrays), world.oracle())


def _initial(change) -> ArrayRecord:
    tensors = World({"h.0.q": (20, 31, 3)}, [1, 1]).draw()
    change(tensors)
    return ArrayRecord(tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_rank, "lora_config gives it rank 3"),
        (lambda t: t.pop(f"{Q}A.weight"), "expected A and B of h.0.q"),
        (
            lambda t: t.update({f"{P}q.lora_A.default.weight": torch.ones(1)}),
            "no name of an adapter",
        ),
        (lambda t: [t.pop(n) for n in list(t) if "lora" in n], "hold no LoRA factors"),
    ],
)
def test_initial_arrays_that_are_no_adapter_of_the_configuration(change, told):
    world = World({"h.0.q": (20, 31, 3)}, [1, 1])
    with pytest.raises(UserError, match=told):
        FedExLora(world.config).start(world.grid(), _initial(change), num_rounds=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "fedexx"}, "did you mean 'fedex'"),
        ({"method": "fedex-keep"}, "expected one of fedex, fedex-svd, fedit, ffa"),
        ({"method": "fedex-svd"}, "expected a whole number from 1"),
        ({"rank": 3}, "expected none"),
        ({"lora_config": LoraConfig(use_dora=True)}, "DoRA"),
        ({"lora_config": "q_proj"}, "expected peft's LoraConfig"),
    ],
)
def test_a_strategy_that_cannot_be(arguments, told):
    with pytest.raises(UserError, match=told):
        FedExLora(**{"lora_config": LoraConfig(), **arguments})


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, fedex_lora.flower; assert not {'torch', 'flwr', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_flower_its_extra_is_named():
    code = "import sys; sys.modules['flwr'] = None; from fedex_lora.flower import FedExLora"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs Flower: pip install 'fedex-lora[flower]'" in done.stderr
