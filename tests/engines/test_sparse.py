"""SLoRA in whole runs: what it trains at first, resumed, exported; test_wire.py has messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import relative
from small_runs import StopAfter, products, recipe

from engines.test_wire import same_bits
from fedex_lora.aggregation.sparse import spread
from fedex_lora.engines.setup import set_up
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.export import export_adapter
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run

SLORA = {"method": {"name": "slora", "options": {"density": 0.1}}}


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_the_values_are_entries_of_the_whole_weight_and_nothing_else_is_trained(kind, tmp_path):
    federation = set_up(recipe(tmp_path, kind, **SLORA))
    model, s = federation.model, federation.settings
    start = start_of(begin(s, federation.initial), s, "ann")
    g = torch.Generator().manual_seed(0)
    moved = {
        n: 0.1 * torch.randn(t.shape, generator=g) if n.endswith(".sparse") else t
        for n, t in start.head.items()
    }
    names = set(dict(model.module.named_parameters()))
    model.write(replace(start, head=moved))
    model.freeze(frozenset())
    taken = {n for n, p in model.module.named_parameters() if p.requires_grad}
    sparse = {n for n in taken if n.endswith("lora_B.default.sparse.values")}
    assert len(sparse) == len(model.layers) and not [n for n in taken - sparse if "lora_" in n]
    rows = federation.clients["ann"]
    batch = federation.task.collator(model.tokenizer)([rows[i] for i in range(4)])
    module = model.module.eval()
    module(**batch).loss.backward()
    base, parameters = module.get_base_model(), model.parameters()
    for name, shape in model.layers.items():  # the same model with D in its weights
        weight = base.get_submodule(name).get_base_layer().weight
        d = spread(name, shape.out, shape.inp, moved[f"{name}.sparse"])
        weight.data += d.T if kind == "gpt2" else d  # Conv1D holds in × out
        weight.requires_grad_(True)
    model.write(
        replace(
            start,
            head={
                n: t * 0 if n in moved and n.endswith(".sparse") else t for n, t in moved.items()
            },
        )
    )
    got = {n: p.grad for n, p in parameters.items() if n.endswith(".sparse")}
    weights = [base.get_submodule(n).get_base_layer().weight for n in model.layers]
    grads = torch.autograd.grad(module(**batch).loss, weights)
    for (name, shape), grad in zip(model.layers.items(), grads):
        grad = (grad.T if kind == "gpt2" else grad).double()
        count = len(moved[f"{name}.sparse"])
        where = spread(name, shape.out, shape.inp, torch.arange(1.0, count + 1)).flatten()
        expected = grad.flatten()[where.nonzero().flatten()]
        order = where[where.nonzero().flatten()].long() - 1
        found = got[f"head/{name}.sparse"]
        assert found is not None and expected.norm() > 0
        assert relative(found[order], expected) < 1e-3
    model.write(federation.initial)
    assert set(dict(model.module.named_parameters())) == names


def test_a_run_that_stopped_goes_on_bit_for_bit_and_exports_both_kinds_of_round(tmp_path):
    wanted = recipe(tmp_path, **SLORA, federation={"clients": 3, "rounds": 2})
    with pytest.raises(KeyboardInterrupt):
        start_run(wanted, tmp_path / "stopped", StopAfter(1))
    resume_run(tmp_path / "stopped")
    start_run(wanted, tmp_path / "whole")
    same_bits(tmp_path / "stopped", tmp_path / "whole")
    trained = open_run(tmp_path / "whole", "last")
    export_adapter(trained, tmp_path / "adapter")
    got = products(tmp_path / "adapter")
    for name, f in trained.state.factors.items():
        expected = f.scale * f.B.double() @ f.A.double()
        assert expected.norm() > 0 and relative(got[name], expected) < 1e-5
    options = {"density": 0.1, "rounds": 2}
    two = {"method": {"name": "slora", "options": options}, "federation": {"rounds": 3}}
    with pytest.raises(KeyboardInterrupt):
        start_run(recipe(tmp_path, **two), tmp_path / "sparse", StopAfter(1))
    first = open_run(tmp_path / "sparse", 1)
    assert not any(f.B.any() for f in first.state.factors.values())
    export_adapter(first, tmp_path / "first")
    got = products(tmp_path / "first")
    for name, shape in first.settings.layers.items():
        d = spread(name, shape.out, shape.inp, first.state.head[f"{name}.sparse"]).double()
        assert d.norm() > 0 and relative(got[name], d) < 1e-5


@pytest.mark.parametrize(
    "blocks, why",
    [
        ({"engine": {"fuse": 3}}, "engine.fuse: slora begins with whole weights"),
        ({"records": {"save_updates": True}}, "records.save_updates: slora's first updates"),
        (
            {"privacy": {"example_level": {"noise_multiplier": 1.0, "delta": 1e-3}}},
            "method.name: the sparse change that slora begins with has no gradients by example",
        ),
        ({"lora": {"ranks": [1, 2, 3]}}, "lora.ranks: slora needs equal ranks"),
        ({"lora": {"init": "x"}}, "lora.init: slora makes its own factors"),
        (
            {"method": {"name": "slora", "options": {"rounds": 3}}},
            "method.options.rounds: more than the 2 of federation.rounds, so LoRA never begins",
        ),
        (
            {"federation": {"clients": 3, "scaffold": True}},
            "federation.scaffold: slora: variates are",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(blocks, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        recipe(tmp_path, **{**SLORA, **blocks})
