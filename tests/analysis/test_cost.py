"""Bytes foretold from shapes against bytes of real messages, and the paper's Table 8."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federation.simulation import initial, settings, simulate
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from safetensors.torch import load
from small_runs import SIZES, recipe

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.setup import POOLED, recipe_task
from fedex_lora.experiments.compare import markdown_table
from fedex_lora.experiments.cost.cost import costs, reference, shapes
from fedex_lora.experiments.cost.plot import cost_plot
from fedex_lora.experiments.cost.table8 import ROWS, compare_row, ratio_table, size_table
from fedex_lora.federation.codec import encode_broadcast, nbytes, pieces
from fedex_lora.federation.state import broadcast_to
from fedex_lora.model.architectures import architecture
from fedex_lora.recipe import LoraSpec
from fedex_lora.runs.plan.traffic import DryRun
from fedex_lora.runs.run import start_run

BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
).filter(lambda found: "__metadata__" not in found)
METRICS = {"loss": 0.25, "steps": 3.0, "seconds": 1.5}


@effort(deadline=None, max_examples=60)
@given(TENSORS, st.text(st.characters(codec="utf-8"), max_size=20))
def test_the_length_of_a_blob_follows_from_shapes_and_safetensors_reads_it(shapes, text):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    blob = b"".join(pieces(tensors, {"about": {"said": text}}))
    there = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert nbytes(there, {"about": {"said": text}}) == len(blob)
    found = load(blob)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }


VARIANTS = {
    "plain": {},
    "bfloat16, sampled": {
        "wire_dtype": BF16,
        "clients_per_round": 2,
        "server_learning_rate": 0.5,
    },
    "ranks": {"ranks": {"a": 1, "b": 3, "c": 2, "d": 3}},
}
CASES = [
    pytest.param(name, variant, id=f"{name}, {title}")
    for title, variant in VARIANTS.items()
    for name, method in METHODS.items()
    if method.exchanges and (method.ranks_may_differ or "ranks" not in variant)
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_message_has_the_bytes_foretold(name, variant):
    s = settings(name, **variant)
    states, _, records = simulate(
        s, rounds=4, breaks=lambda u: replace(u, metrics=METRICS, nbytes=None)
    )
    run = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    for state, record in zip(states[1:], records):
        up, down = run.round()
        assert {c: size.bytes for c, size in up.items()} == record["bytes_up"]
        foretold = {c: size.bytes for c, size in down.items()}
        if s.method.residual == "partial":  # how much of it is known only from the numbers
            assert all(record["bytes_down"][c] <= most for c, most in foretold.items())
            continue
        assert foretold == record["bytes_down"]
        changed = {k: v for k, v in state.changed.items() if not k.startswith("own/")}
        joins = broadcast_to(replace(state, held={}, changed=changed), s, "a")
        assert run.catch_up().bytes == len(encode_broadcast(joins, s.wire_dtype))


def test_a_real_run_of_full_fine_tuning_sends_the_bytes_foretold(tmp_path):
    r = recipe(tmp_path, "gpt2", method={"name": "full"})
    results = start_run(r, tmp_path / "run")
    task = recipe_task(r)
    model = architecture(
        r.model.name,
        None,
        auto_model=task.auto_model,
        peft_task_type=task.peft_task_type,
        model_kwargs=task.model_kwargs(),
    )
    run = DryRun(federation_settings(r, model, list(SIZES)), model.head)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        up, down = run.round()
        assert {c: size.bytes for c, size in up.items()} == json.loads(line)["bytes_up"]
        assert {c: size.bytes for c, size in down.items()} == json.loads(line)["bytes_down"]
    assert sum(run.down(client).bytes for client in SIZES) == results["bytes_delivery"]


def test_pooled_data_have_one_client_and_nobody_alone_sends_anything():
    model = shapes("gpt2", LoraSpec(r=2))
    found = {c.method: c for c in costs(model, clients=3, rounds=2)}
    assert list(found) == list(METHODS)
    for name, method in METHODS.items():
        assert found[name].clients == (1 if method.pooled else 3)
        assert (found[name].total.bytes > 0) == method.exchanges
        assert found[name].model.numbers == found[name].clients * model.adapted.size
    assert POOLED not in found
    size = model.adapted.size
    assert found["full"].total.numbers == 3 * 2 * 2 * size  # up and down, clients, rounds


def test_exact_averaging_costs_its_residual_more_than_plain_until_that_is_dense():
    model = shapes("gpt2", LoraSpec(r=4))
    (site,) = set(model.adapted.layers.values())
    for k in (1, 2, 10, 200):
        plain, exact = costs(model, ["fedit", reference()], clients=k, rounds=1)
        residual = min((k - 1) * 4 * (site.out + site.inp), site.out * site.inp)
        assert exact.total.numbers - plain.total.numbers == 12 * k * residual


@pytest.fixture(scope="module")
def table8():
    return [compare_row(row) for row in ROWS]


def test_table_8(table8):
    found = {(c.row.model, c.row.rank): c for c in table8}
    large, gpt2 = found["roberta-large", 4], found["gpt2", 8]
    assert large.convention == pytest.approx((10.404, 0.9843, 0.9791), abs=5e-4)
    assert large.convention == pytest.approx(large.row.printed, rel=1e-3)
    assert found["gpt2", 4].convention == pytest.approx((10.171, 0.955, 0.938), abs=5e-4)
    assert gpt2.convention == pytest.approx((9.459, 0.9159, 0.8854), abs=5e-4)
    assert gpt2.convention == pytest.approx(gpt2.row.printed, rel=2e-3)
    base = found["roberta-base", 4]
    assert base.convention == pytest.approx((10.213, 0.984, 0.978), abs=5e-4)
    size, adapter, head = base.sizes
    least, most, head_implied = base.implied
    assert 0.5 < least / (size / adapter) < most / (size / adapter) < 0.6
    assert head_implied / (size / head) == pytest.approx(0.1, abs=0.01)
    for c in table8:  # a residual of rank (k − 1)·r is a third smaller than one of k·r
        assert all(ours > by for ours, by in zip(c.ours, c.convention))


def test_the_document_holds_what_is_computed(table8):
    text = (Path(__file__).parents[2] / "docs" / "table8.md").read_text()
    for table in (ratio_table(table8), size_table(table8)):
        assert markdown_table(*table) in text


def test_the_plot_shows_what_was_measured():
    model = shapes("gpt2", LoraSpec(r=1))
    figure, rows = cost_plot("gpt2", model, [1, 3], ["fedex", "full"])
    assert [(r["method"], r["clients"]) for r in rows] == [
        ("fedex", 1),
        ("fedex", 3),
        ("full", 1),
        ("full", 3),
    ]
    assert all((r["server_seconds"] is None) == (r["method"] == "full") for r in rows)
    client, server, seconds = figure.axes
    assert [list(line.get_ydata()) for line in server.get_lines()] == [
        [r["server_bytes"] for r in rows if r["method"] == m] for m in ("fedex", "full")
    ]
    assert list(seconds.get_lines()[0].get_ydata()) == [r["server_seconds"] for r in rows[:2]]
    assert client.get_xscale() == client.get_yscale() == "log"
