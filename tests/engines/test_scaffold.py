"""SCAFFOLD in real training: its steps and variates; runs here, resumed and through messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import StopAfter, recipe
from test_proximal import SGD

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import CLIENTS, quick, same_bits, timeless
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.engines.own_loop import OwnLoop
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Trained, take_turns, turn_of
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import flat
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.by_hand.opening import names_of
from fedex_lora.runs.run import resume_run, start_run

__all__ = ["quick"]
ON = {"scaffold": True, "clients": 3, "rounds": 3}


def test_under_sgd_the_next_variate_is_the_paper_s(tmp_path):
    training = {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    spec = recipe(tmp_path, federation=ON, training={**training, "max_steps": 3})
    federation = set_up(spec)
    g = torch.Generator().manual_seed(0)
    start = federation.initial
    shift = {n: 0.1 * torch.randn(t.shape, generator=g) for n, t in flat(start).items()}
    turn = turn_of(
        federation.settings, "ann", 1, federation.clients["ann"], replace(start, variates=shift)
    )
    train = HFTrainer(federation.task, spec.trainer_arguments)
    (found,) = train(federation.model, [turn])
    assert found.end is not None and found.end.variates.keys() == shift.keys()
    began, ended = flat(start), flat(replace(found.end, variates={}))
    for name, c in found.end.variates.items():
        x, y = began[name].double(), ended[name].double()
        option_ii = -shift[name].double() + (x - y) / (3 * 0.3)  # cᵢ − c + (x − y)/(Kη)
        torch.testing.assert_close(c.double(), option_ii, rtol=1e-3, atol=1e-7)
        assert c.any()
    (plain,) = train(federation.model, [replace(turn, start=start)])
    assert plain.end is not None and not plain.end.variates  # no hook is left


def test_a_run_is_the_same_resumed_and_through_messages(tmp_path):
    federation = {**ON, "wire_dtype": "bfloat16", "clients_per_round": 2}
    spec = recipe(tmp_path, federation=federation, evaluation=CLIENTS)
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "local", StopAfter(2))
    resume_run(tmp_path / "local")
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    start_run(remote(spec), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    assert timeless(tmp_path / "local") == timeless(tmp_path / "remote")
    for record in timeless(tmp_path / "remote"):
        for client, count in record["bytes_up"].items():
            assert count == courier.up[record["round"], client]


def test_what_makes_no_variates_is_refused(tmp_path):
    for key, block, why in (
        ("engine", {"fuse": 3}, "fused clients train without it"),
        ("training", {"fp16": True}, "training.fp16 scales"),
        ("privacy", {"example_level": {"delta": 1e-5, "noise_multiplier": 1}}, "row by row"),
        ("privacy", {"secure_aggregation": {}}, "the coordinator keeps every client's variate"),
        ("method", {"name": "fedsa"}, "that all clients share"),
    ):
        with pytest.raises(ValueError, match=f"federation.scaffold: .*{why}"):
            recipe(tmp_path, federation=ON, **{key: block})
    spec = recipe(tmp_path, federation=ON)
    with pytest.raises(UserError, match=r"federation.scaffold: .* rounds by hand"):
        names_of(spec)
    f = set_up(spec)
    turn = turn_of(f.settings, "ann", 1, f.clients["ann"], f.initial)
    stage = Stage(f.model, f.task, f.settings.method)
    loop = OwnLoop(lambda *_, **__: Trained())
    with pytest.raises(UserError, match=r"^scaffold: .* HFTrainer"):
        take_turns(stage, loop, [turn], Ledger(), f.settings)
