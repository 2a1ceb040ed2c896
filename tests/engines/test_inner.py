"""Fed-SB and RAVAN in whole runs; test_wire.py has them through messages."""

from __future__ import annotations

import pytest
import torch
from oracles import relative
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import StopAfter, recipe
from transformers import AutoModelForSequenceClassification

from engines.test_wire import same_bits
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training import GRADIENT_BATCHES, HFTrainer
from fedex_lora.engines.turn import Turn
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.export import export_adapter
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run

SB = {"method": {"name": "fed-sb", "options": {"step": 0.01}}}
RAVAN = {"method": {"name": "ravan", "options": {"heads": 2}}}


@pytest.mark.parametrize("method", [SB, RAVAN])
def test_a_run_that_stopped_goes_on_bit_for_bit_and_exports_its_model(method, tmp_path):
    wanted = recipe(tmp_path, **method, federation={"clients": 3, "rounds": 3})
    local = tmp_path / "local"
    with pytest.raises(KeyboardInterrupt):
        start_run(wanted, local, StopAfter(1))
    resume_run(local)
    start_run(wanted, tmp_path / "whole")
    same_bits(local, tmp_path / "whole")
    trained = open_run(local, "last")
    f, head = trained.state.factors, trained.state.head
    site = sorted(f)[0]
    export_adapter(trained, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(wanted.model.name, num_labels=3)
    exported = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    layer = exported.get_base_model().get_submodule(site)
    r = head[f"{site}.inner"].double()
    if r.ndim == 3:  # rank 3 in heads of 2 and 1
        r = torch.block_diag(r[0], r[1][:1, :1])
    expected = f[site].scale * f[site].B.double() @ r @ f[site].A.double()
    assert expected.norm() > 0.01
    torch.testing.assert_close(
        layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-7
    )
    assert not [
        n for n in load_file(tmp_path / "adapter/adapter_model.safetensors") if "inner" in n
    ]


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_the_gradient_is_that_of_the_mean_loss_in_the_whole_weight(kind, tmp_path):
    wanted = recipe(tmp_path, kind, **SB, training={"per_device_train_batch_size": 16})
    federation = set_up(wanted)
    model, rows = federation.model, federation.clients["ann"]
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start = start_of(begin(federation.settings, federation.initial), federation.settings, "ann")
    turn = Turn("ann", 1, rows, start, frozenset(), seed=0)
    (found,) = HFTrainer(federation.task, federation.recipe.trainer_arguments)(model, [turn])
    assert found.end is not None and len(rows) < GRADIENT_BATCHES * 16
    model.module.eval()
    model.write(turn.plain_start)
    batch = federation.task.collator(model.tokenizer)([rows[i] for i in range(len(rows))])
    loss = model.module(**batch).loss
    assert abs(loss.item() - found.metrics["loss"]) < 1e-5
    for name, shape in model.layers.items():
        weight = model.module.get_base_model().get_submodule(name).get_base_layer().weight
        weight.requires_grad_(True)
        (grad,) = torch.autograd.grad(model.module(**batch).loss, weight)
        weight.requires_grad_(False)
        grad = grad.T if kind == "gpt2" else grad  # Conv1D holds in × out
        got = found.end.head[f"{name}.weight"]
        assert got.shape == (shape.out, shape.inp) and relative(got, grad.double()) < 1e-3


def test_a_model_takes_R_in_and_out_again(tmp_path):
    federation = set_up(recipe(tmp_path))
    model, initial = federation.model, federation.initial
    names = set(dict(model.module.named_parameters()))
    inner = {f"{n}.inner": torch.full((s.rank, s.rank), 2.0) for n, s in model.layers.items()}
    model.write(AdapterState(initial.layers, {**initial.head, **inner}))
    model.freeze(frozenset())
    trained = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert len([n for n in trained if n.endswith("lora_B.default.inner")]) == len(inner)
    assert not [n for n in trained if n.endswith("weight") and ".lora_" in n]
    assert torch.equal(
        model.read().head[f"{next(iter(model.layers))}.inner"], torch.full((3, 3), 2.0)
    )
    model.write(initial)
    assert set(dict(model.module.named_parameters())) == names


def test_of_heads_the_scales_are_trained_too_and_the_products_are_sent(tmp_path):
    federation = set_up(recipe(tmp_path, **RAVAN))
    model, rows = federation.model, federation.clients["ann"]
    start = start_of(begin(federation.settings, federation.initial), federation.settings, "ann")
    inner = {n for n in start.head if n.endswith(".inner")}
    start = AdapterState(
        start.layers, {n: t + 0.5 if n in inner else t for n, t in start.head.items()}
    )
    turn = Turn("ann", 1, rows, start, frozenset(), seed=0)
    (found,) = HFTrainer(federation.task, federation.recipe.trainer_arguments)(model, [turn])
    assert found.end is not None
    parts = dict(model.module.named_parameters())
    scales = [n for n in parts if n.endswith("lora_B.default.scales")]
    assert len(scales) == len(inner) == len(model.layers)
    for name in scales:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.scales")
        s, h = parts[name], parts[name.removesuffix("scales") + "inner"]
        assert not torch.equal(s, torch.ones(2))
        expected = torch.stack([s[0] * h[0], s[1] * h[1]])
        torch.testing.assert_close(found.end.head[f"{layer}.inner"], expected.detach())
    for site, f in found.end.layers.items():
        assert torch.equal(f.A, start.layers[site].A) and torch.equal(f.B, start.layers[site].B)
    model.write(start)
    assert all(torch.equal(parts[name], torch.ones(2)) for name in scales)


@pytest.mark.parametrize(
    "blocks, why",
    [
        (
            {"model": {"quantisation": "nf4", "placement": "side"}},
            "model.quantisation: fed-sb begins with gradients",
        ),
        ({"engine": {"fuse": 3}}, "engine.fuse: fed-sb has a matrix between the factors"),
        ({"records": {"save_updates": True}}, "records.save_updates: fed-sb's first updates"),
        ({"privacy": {"secure_aggregation": {}}}, "privacy.secure_aggregation: fed-sb makes its"),
        (
            {"privacy": {"example_level": {"noise_multiplier": 1.0, "delta": 1e-3}}},
            "method.name: fed-sb begins with gradients",
        ),
        ({"lora": {"ranks": [1, 2, 3]}}, "lora.ranks: fed-sb needs equal ranks"),
        ({**RAVAN, "engine": {"fuse": 3}}, "engine.fuse: ravan has a matrix between the factors"),
        (
            {**RAVAN, "privacy": {"example_level": {"noise_multiplier": 1.0, "delta": 1e-3}}},
            "method.name: the matrix that ravan has between the factors has no gradients by",
        ),
        ({**RAVAN, "lora": {"init": "x"}}, "lora.init: ravan makes its own factors"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(blocks, why, tmp_path):
    model = blocks.pop("model", {})
    with pytest.raises(ValueError, match=why):
        recipe(tmp_path, **{**SB, **blocks}, **({"model": {"name": "x", **model}} if model else {}))
