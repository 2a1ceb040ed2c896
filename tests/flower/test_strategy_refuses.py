"""What FedExLora refuses, of replies, of initial arrays and of arguments."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from peft import LoraConfig

from fedex_lora.errors import UserError
from fedex_lora.flower import FedExLora
from flower.nodes import InProcess, failure, identity, reply, served  # noqa: F401
from flower.worlds import P, World

pytestmark = pytest.mark.usefixtures("identity")


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
    assert world.close(world.change(found.arrays))

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
    assert world.close(world.change(found.arrays))


@pytest.mark.parametrize(("rows", "loss"), [([0, 3, 1], 1.25), ([0, 0, 0], None)])
def test_clients_without_rows_to_evaluate_on_score_nothing(world, rows, loss):
    grid = world.grid()

    def scoring(i: int, honest):
        def answer(message: Message) -> Message:
            if message.metadata.message_type == "train":
                return honest(message)
            return reply(message, {}, num_examples=rows[i], loss=float(i if rows[i] else "nan"))

        return answer

    for i, (node, honest) in enumerate(list(grid.clients.items())):
        grid.clients[node] = scoring(i, honest)
    found = FedExLora(world.config).start(grid, world.initial(), num_rounds=2)
    scores = {n: dict(record) for n, record in found.evaluate_metrics_clientapp.items()}
    assert scores == ({1: {"loss": loss}, 2: {"loss": loss}} if loss else {})
    assert world.close(world.change(found.arrays))


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
