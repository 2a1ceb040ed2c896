"""HetLoRA's self-pruning in real training: its penalty; runs here, resumed and through messages."""

from __future__ import annotations

import pytest
import torch
from small_runs import StopAfter, recipe
from test_proximal import SGD

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import CLIENTS, quick, same_bits, timeless
from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.pruning import Pruning
from fedex_lora.engines.own_loop import OwnLoop
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Trained, Turn
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import flat
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import resume_run, start_run

__all__ = ["quick"]
PRUNED = {"name": "hetlora", "options": {"decay": 0.5, "penalty": 0.02}}


def test_a_step_is_pulled_by_the_penalty_s_gradient(tmp_path):
    federation = set_up(recipe(tmp_path, training={**SGD, "per_device_train_batch_size": 2}))
    g = torch.Generator().manual_seed(0)
    layers = {
        name: Factors(f.A, torch.randn(f.B.shape, generator=g), f.scale)
        for name, f in federation.initial.layers.items()
    }
    start = AdapterState(layers, federation.initial.head)
    given = {**federation.recipe.trainer_arguments, "max_steps": 1}
    given["gradient_accumulation_steps"] = 2
    train, rows = HFTrainer(federation.task, given), federation.clients["ann"]

    def end(pruning):
        turn = Turn("ann", 1, rows, start, frozenset("AB"), 0, pruning)
        (found,) = train(federation.model, [turn])
        assert found.end is not None
        return {name: t.double() for name, t in flat(found.end).items()}

    plain, pruning = end(None), Pruning(0.7, 0.1)  # of rank 3 the last is to go
    for name, t in end(pruning).items():
        kind, _, layer = name.partition("/")
        wanted = torch.zeros_like(t)
        if kind in "AB":
            a, b = layers[layer].A[2:].double(), layers[layer].B[:, 2:].double()
            if kind == "A":
                wanted[2:] = -0.3 * 0.1 * b.norm() * a / a.norm()
            else:
                wanted[:, 2:] = -0.3 * 0.1 * a.norm() * b / b.norm()
        torch.testing.assert_close(t - plain[name], wanted, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(t, plain[n]) for n, t in end(None).items())  # no hook is left


def test_a_run_that_prunes_is_the_same_resumed_and_through_messages(tmp_path):
    federation = {"clients": 3, "rounds": 4, "max_norm_ratio": 1000}
    spec = recipe(
        tmp_path, method=PRUNED, lora={"ranks": [4, 8, 3]}, federation=federation,
        training=SGD, evaluation=CLIENTS,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "local", StopAfter(3))
    resume_run(tmp_path / "local")
    records = timeless(tmp_path / "local")
    assert records[0]["ranks"] == {"ann": 4, "bob": 8, "cleo": 3}
    assert all(records[-1]["ranks"][c] < r for c, r in records[0]["ranks"].items())
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    start_run(remote(spec), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    assert records == timeless(tmp_path / "remote")


def test_what_trains_without_the_penalty_is_refused(tmp_path):
    blocks = {"method": PRUNED}
    for key, block, why in (
        ("engine", {"fuse": 3}, "fused clients keep one rank"),
        ("training", {"fp16": True}, "training.fp16 scales"),
        ("privacy", {"example_level": {"delta": 1e-5, "noise_multiplier": 1}}, "row by row"),
    ):
        with pytest.raises(ValueError, match=f"method.options.decay: .*{why}"):
            recipe(tmp_path, **blocks, **{key: block})
    federation = set_up(recipe(tmp_path))
    turn = Turn("ann", 1, federation.clients["ann"], federation.initial, frozenset("AB"), 0)
    turn = Turn(**{**vars(turn), "pruning": Pruning(0.5, 1.0)})
    with pytest.raises(UserError, match=r"method.options.decay: adds a penalty"):
        OwnLoop(lambda *_, **__: Trained())(federation.model, [turn])
