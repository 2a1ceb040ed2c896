"""Clients trained in one pass end where each would have ended by itself."""

from __future__ import annotations

import json

import pytest
import small_runs
import torch
from pydantic import ValidationError
from small_runs import SIZES, recipe
from tiny import ENCODERS, TEXT, tiny
from torch import nn
from torch.nn import functional

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.engines.fused.batches import Rows, together
from fedex_lora.engines.fused.losses import client_losses, labelled_losses
from fedex_lora.engines.fused.stack import Stack
from fedex_lora.engines.fused.train import Fused
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Turn
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import flat
from fedex_lora.recipe.reader import differences
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "gemma2": {},
}
TRAINING = {
    "learning_rate": 2e-2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
}
LINEAR = {"bert": {"target_modules": ["query", "intermediate.dense"]}}


def made(folder, kind="roberta", **blocks):
    tiny(kind, folder / kind, **NO_DROPOUT[kind])
    blocks = {"training": TRAINING, "lora": LINEAR.get(kind, {}), **blocks}
    return recipe(folder, kind, **blocks)


def both_ways(federation, trained="AB", starts=None, **training):
    """What the clients come to one after the other, and all of them in one pass."""
    model, task = federation.model, federation.task
    starts = starts or dict.fromkeys(federation.clients, federation.initial)
    given = {**federation.recipe.trainer_arguments, **training}
    clients = federation.clients.items()
    turns = [Turn(c, 2, rows, starts[c], frozenset(trained), 3) for c, rows in clients]
    return HFTrainer(task, given)(model, turns), Fused(task, given, len(turns))(model, turns)


def assert_same(alone, fused):
    for one, other in zip(alone, fused, strict=True):
        assert one.metrics["steps"] == other.metrics["steps"]
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        expected, got = flat(one.end), flat(other.end)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("kind", NO_DROPOUT)
def test_each_client_ends_where_it_would_have_ended_by_itself(tmp_path, kind, monkeypatch):
    """With batches of 2, the clients have 9, 3 and 5 rows: their last batches differ in size, and
    they take 10, 4 and 6 steps."""
    federation = set_up(made(tmp_path, kind))
    counted: list[int] = []  # steps that took logits at labelled positions alone

    def labelled(*given):
        counted.append(1)
        return labelled_losses(*given)

    monkeypatch.setattr("fedex_lora.engines.fused.train.labelled_losses", labelled)
    alone, fused = both_ways(federation)
    assert_same(alone, fused)
    assert len(counted) == (0 if kind in ENCODERS else 10)
    assert [u.metrics["steps"] for u in fused] == [10, 4, 6]
    start = federation.initial.layers
    ends = [(start[name].A, f.A) for u in fused for name, f in u.end.layers.items()]
    moved = [(end - begun).norm() / end.norm() for begun, end in ends]
    assert min(moved) > 1e-3  # far more than the tolerance


@pytest.mark.parametrize(
    "training",
    [
        {"train_sampling_strategy": "random", "lr_scheduler_type": "cosine"},
        {"max_steps": 7, "max_grad_norm": 0.0, "optim": "sgd"},
        {"optim": "adafactor", "dataloader_drop_last": True},
    ],
)
def test_so_it_is_with_other_orders_schedules_and_optimizers(tmp_path, training):
    assert_same(*both_ways(set_up(made(tmp_path)), **training))


def test_so_it_is_from_different_starts_with_one_factor_frozen(tmp_path):
    federation = set_up(made(tmp_path))
    starts = {}
    for i, client in enumerate(federation.clients, 1):
        moved = {
            n: Factors(i * f.A, f.B + 0.1 * i, f.scale)
            for n, f in federation.initial.layers.items()
        }
        starts[client] = AdapterState(moved, federation.initial.head)
    alone, fused = both_ways(federation, "B", starts)
    assert_same(alone, fused)
    for client, one in zip(federation.clients, fused, strict=True):
        for name, f in one.end.layers.items():
            assert torch.equal(f.A, starts[client].layers[name].A)


def test_so_it_is_in_regression(tmp_path, monkeypatch):
    def write_pairs(folder):
        files = write_rows(folder)
        for file in folder.iterdir():
            rows = map(json.loads, file.read_text().splitlines())
            pairs = [
                {"sentence1": row["text"], "sentence2": TEXT[0], "label": row["label"] + 0.5}
                for row in rows
            ]
            file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return files

    write_rows = small_runs.write_rows
    monkeypatch.setattr(small_runs, "write_rows", write_pairs)
    task = {"kind": "glue", "name": "stsb", "labels": None}
    federation = set_up(made(tmp_path, task=task))
    assert federation.task.regression
    assert_same(*both_ways(federation))


def test_the_model_is_afterwards_what_it_was(tmp_path):
    federation = set_up(made(tmp_path))
    alone, _ = both_ways(federation)
    again, _ = both_ways(federation)
    for one, other in zip(alone, again):
        for name, tensor in flat(one.end).items():
            assert torch.equal(tensor, flat(other.end)[name])


def test_a_client_without_numbers_spoils_nobody_elses(tmp_path):
    federation = set_up(made(tmp_path))
    bad = {n: Factors(f.A * torch.nan, f.B, f.scale) for n, f in federation.initial.layers.items()}
    starts = dict.fromkeys(federation.clients, federation.initial)
    starts["bob"] = AdapterState(bad, federation.initial.head)
    alone, fused = both_ways(federation, starts=starts)
    assert_same([alone[0], alone[2]], [fused[0], fused[2]])
    assert fused[1].metrics["loss"] != fused[1].metrics["loss"]


@pytest.mark.parametrize("method", ["fedex", "ffa", "rolora", "local", "fedex-svd"])
@pytest.mark.parametrize("placement", ["fold", "side"])
def test_a_whole_run_is_the_same(tmp_path, method, placement):
    name = {"name": method, "rank": 2} if method == "fedex-svd" else {"name": method}
    blocks = {"method": name, "model": {"placement": placement}}
    runs = {}
    for fuse in (1, 2):  # of three clients: two in one pass, and one by itself
        start_run(made(tmp_path, **blocks, engine={"fuse": fuse}), tmp_path / str(fuse))
        runs[fuse] = RunDir(tmp_path / str(fuse))
    one, other = (run.newest()[0] for run in runs.values())
    for site, f in one.factors.items():
        torch.testing.assert_close(other.factors[site].A, f.A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.factors[site].B, f.B, rtol=1e-4, atol=1e-5)
    for record, fused in zip(runs[1].records(), runs[2].records()):
        assert record["clients"].keys() == fused["clients"].keys() == SIZES.keys()
        for client, said in record["clients"].items():
            assert said.keys() == fused["clients"][client].keys()
            assert fused["clients"][client]["loss"] == pytest.approx(said["loss"], rel=1e-4)


def test_a_stack_multiplies_each_clients_rows_by_its_own_matrix():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    stack = Stack([layer], 3)
    own = []
    for client in range(3):
        with torch.no_grad():
            layer.weight.normal_()
            layer.bias.normal_()
        stack.put(client)
        own.append((layer.weight.clone(), layer.bias.clone()))
    x = torch.randn(6, 5, 4)
    with stack.all():
        y = layer(x)
        stack.active = 2
        fewer = layer(x[:4])
    expected = [functional.linear(x[2 * i : 2 * i + 2], *own[i]) for i in range(3)]
    torch.testing.assert_close(y, torch.cat(expected))
    torch.testing.assert_close(fewer, torch.cat(expected[:2]))
    torch.testing.assert_close(layer(x), functional.linear(x, *own[2]))  # itself again


def test_gradients_of_a_stack_are_each_clients_own():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    stack = Stack([layer], 2)
    for client in range(2):
        stack.put(client)
    x = torch.randn(2, 4)
    with stack.all():
        (layer(x) * torch.tensor([[1.0], [10.0]])).sum().backward()
    for client, factor in enumerate((1.0, 10.0)):
        (parameter,) = stack.trained(client)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, factor * x[client].expand(3, 4))
    stack.zero_grad()
    assert not any(p.grad.any() for c in range(2) for p in stack.trained(c))


def test_losses_are_each_clients_mean_over_what_counts():
    real = torch.tensor([True, True, True, False])
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.0], [9.0, 0.0]])
    p = logits.softmax(1)
    expected = [-(p[0, 0].log() + p[1, 1].log()) / 2, -p[2, 1].log()]
    found = client_losses(logits, torch.tensor([0, 1, 1, 1]), real, [2, 1], False)
    torch.testing.assert_close(found, torch.stack(expected))
    numbers = torch.tensor([1.0, 2.0, 3.0, 3.0])
    found = client_losses(logits[:, :1], numbers, real, [2, 1], True)
    torch.testing.assert_close(found, torch.tensor([(1 + 0) / 2, 2.5**2]))


def test_a_client_with_fewer_rows_is_filled_up_with_rows_that_do_not_count():
    batch, real = together([Rows([{"x": 1}, {"x": 2}]), Rows([{"x": 3}])], lambda rows: rows)
    assert [row["x"] for row in batch] == [1, 2, 3, 3]
    assert real.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("blocks", "wrong"),
    [
        ({"engine": {"fuse": 0}}, "engine.fuse"),
        ({"engine": {"fuse": 2, "kind": "flower"}}, "engine.fuse"),
        ({"engine": {"fuse": 2}, "method": {"name": "full"}}, "engine.fuse"),
        ({"engine": {"fuse": 2}, "method": {"name": "fedex-keep"}}, "engine.fuse"),
        ({"engine": {"fuse": 2}, "training": {"gradient_accumulation_steps": 2}}, "training.grad"),
        ({"engine": {"fuse": 2}, "training": {"gradient_checkpointing": True}}, "training.g"),
        ({"engine": {"fuse": 2}, "training": {"report_to": "tensorboard"}}, "training.report_to"),
        ({"engine": {"fuse": 2}, "method": {"name": "flexlora"}, "lora": {"ranks": [1, 2, 3]}},
         "engine.fuse"),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_is_refused(tmp_path, blocks, wrong):
    with pytest.raises(ValidationError, match=wrong):
        recipe(tmp_path, **blocks)


def test_an_adapted_embedding_cannot_be_fused(tmp_path):
    with pytest.raises(UserError, match=r"engine.fuse: .* Embedding is trained"):
        set_up(recipe(tmp_path, "bert", engine={"fuse": 3}))
    assert set_up(recipe(tmp_path, "bert", engine={"fuse": "auto"})).recipe.engine.fuse == 1


@pytest.mark.parametrize(
    "blocks",
    [
        {"training": {"gradient_checkpointing": True}},
        {"method": {"name": "fedex-keep"}},
        {"method": {"name": "fedex-hetero"}, "lora": {"ranks": [1, 2, 3]}},
        {"federation": {"proximal": 0.1}},
        {"method": {"name": "full"}},
    ],
)
def test_auto_is_one_by_one_where_one_pass_cannot_be_had(tmp_path, blocks):
    assert recipe(tmp_path, engine={"fuse": "auto"}, **blocks).fused == 1
    assert recipe(tmp_path, engine={"fuse": "auto"}).fused == 3


def test_auto_takes_what_is_faster(tmp_path, monkeypatch):
    told = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    measured = iter([0.3, 0.1, 0.3, 0.29])
    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", lambda _: next(measured))
    auto = made(tmp_path, engine={"fuse": "auto"})
    for name, chosen in (("faster", 3), ("no-faster", 1)):
        monkeypatch.setenv("FEDEX_LORA_CACHE", str(tmp_path / "measured" / name))
        start_run(auto, tmp_path / name, Notes())
        assert RunDir(tmp_path / name).recipe().engine.fuse == chosen
    assert told[0] == "fuse: 3 (seconds a client's step: alone 0.3, 3 in one pass 0.1)"
    assert not differences(auto, RunDir(tmp_path / "faster").recipe())


def test_measuring_does_not_change_the_run(tmp_path):
    start_run(made(tmp_path, engine={"fuse": "auto"}), tmp_path / "auto")
    chosen = RunDir(tmp_path / "auto").recipe()
    start_run(chosen, tmp_path / "named")
    auto, named = (RunDir(tmp_path / n).newest()[0] for n in ("auto", "named"))
    assert all(torch.equal(f.B, named.factors[s].B) for s, f in auto.factors.items())
