# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Deviation by layer, matrix and round, against numbers worked out by hand and from updates."""

import json
import math

import pytest
from made_up import made_up, spec
from safetensors.torch import load_file
from small_runs import LORA, recipe

from fedex_lora.engines.setup import recipe_model, recipe_task
from fedex_lora.experiments.analysis.deviation import (
    across_layers,
    across_rounds,
    best_scaling,
    depth_trend,
    deviations,
    first_round,
    kind_of,
    kinds,
    layer_of,
    query_over_value,
    round_trend,
    table,
)
from fedex_lora.experiments.analysis.drawn import banded
from fedex_lora.experiments.analysis.runs import read_run


@pytest.mark.parametrize(
    ("site", "layer", "kind"),
    [
        ("roberta.encoder.layer.11.attention.self.query", 11, "Q"),
        ("bert.encoder.layer.0.attention.self.key", 0, "K"),
        ("bert.encoder.layer.2.attention.output.dense", 2, "O"),
        ("bert.encoder.layer.2.intermediate.dense", 2, "MLP up"),
        ("bert.encoder.layer.2.output.dense", 2, "MLP down"),
        ("bert.embeddings.word_embeddings", None, "embedding"),
        ("distilbert.transformer.layer.1.attention.q_lin", 1, "Q"),
        ("transformer.h.3.attn.c_attn", 3, "QKV"),
        ("transformer.h.3.attn.c_proj", 3, "O"),
        ("transformer.h.3.mlp.c_proj", 3, "MLP down"),
        ("model.layers.31.self_attn.v_proj", 31, "V"),
        ("model.layers.31.mlp.gate_proj", 31, "MLP up"),
        ("vit.encoder.layer.4.attention.attention.value", 4, "V"),
        ("encoder.block.5.layer.0.SelfAttention.q", 5, "Q"),
        ("gpt_neox.layers.7.attention.query_key_value", 7, "QKV"),
        ("classifier.out", None, "out"),
    ],
)
def test_layer_and_matrix_follow_from_the_name(site, layer, kind):
    assert (layer_of(site), kind_of(site)) == (layer, kind)


@pytest.mark.parametrize("name", LORA)
def test_every_linear_layer_of_real_architectures_has_a_place(name, tmp_path):
    spec = recipe(tmp_path, name, lora={"target_modules": "all-linear"})
    layers = recipe_model(spec, recipe_task(spec)).layers
    known = {"Q", "K", "V", "QKV", "O", "MLP up", "MLP down"}
    blocks = [site for site in layers if layer_of(site) is not None]
    assert {kind_of(site) for site in blocks} <= known and len(blocks) >= 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return deviations(read_run(made_up(tmp_path_factory.mktemp("m") / "run", spec())))


def test_curves_are_means_over_sites_and_runs(rows):
    layers = across_layers([rows, rows], "Q", "absolute")
    two_thirds = pytest.approx(2 / 3)
    assert layers == {0: [2, 2], 1: [1, 1], 2: [two_thirds, two_thirds], 3: [0.5, 0.5]}
    first = across_rounds([rows], "absolute", ["Q"], layer=0)
    assert first == {1: [2], 2: [1], 3: [two_thirds]}
    both = across_rounds([rows], "absolute", ["Q", "V"])
    assert both[1][0] == pytest.approx(1.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_a_band_reaches_from_the_lowest_run_to_the_highest(tmp_path, rows):
    other = made_up(tmp_path / "run", spec(), by_site=lambda site, round: 1.0)
    layers = across_layers([rows, deviations(read_run(other))], "Q", "absolute")
    series = banded("Q", 0, layers)
    assert (series.low[0], series.y[0], series.high[0]) == (1.0, 1.5, 2.0)


def test_the_paper_s_trends_as_log_ratios(rows):
    assert depth_trend(rows, "absolute") == pytest.approx(math.log((1 / 3 + 1 / 4) / (1 + 1 / 2)))
    assert query_over_value(rows, "absolute") == pytest.approx(math.log(2))
    assert round_trend(rows, "absolute") == pytest.approx(math.log(1 / 3))
    assert first_round(rows, "relative") == pytest.approx(math.log(1.5 * (25 / 12) / 4 / 10))


def test_scalings_need_what_they_divide_by(rows):
    assert best_scaling(rows) == "absolute" and rows[0].scaled("entry") is None
    assert rows[0].scaled("relative") == pytest.approx(rows[0].deviation / 10)


def test_real_runs_give_what_their_updates_say(small_run):
    """‖Σ wᵢsBᵢAᵢ − s·B̄Ā‖ in float64 from the saved updates, with m·n from the checkpoint."""
    path, _ = small_run
    rows = [r for r in deviations(read_run(path)) if r.round == 1]
    assert kinds(rows) == ["Q", "V"] and best_scaling(rows) == "entry"
    for row in rows:
        ideal, averaged = products(path / "rounds" / "0001", row.site)
        assert row.deviation == pytest.approx((ideal - averaged).norm().item(), rel=1e-4)
        assert row.ideal == pytest.approx(ideal.norm().item(), rel=1e-4)
        assert row.numbers == ideal.numel()
        assert row.scaled("entry") == pytest.approx(row.deviation / ideal.numel() ** 0.5)


def products(folder, site, scale=5 / 3):
    weights = json.loads((folder / "global" / "weights.json").read_text())
    a, b = {}, {}
    for client in weights:
        tensors = load_file(folder / "clients" / client / "adapter_model.safetensors")
        key = f"base_model.model.{site}.lora_"
        a[client], b[client] = (tensors[f"{key}{x}.weight"].double() for x in "AB")
    ideal = sum(w * scale * b[c] @ a[c] for c, w in weights.items())
    mean_a, mean_b = (sum(w * x[c] for c, w in weights.items()) for x in (a, b))
    return ideal, scale * mean_b @ mean_a


def test_the_table_has_a_row_for_every_site_and_round(rows):
    found = list(table({"run": rows}))
    assert len(found) == 8 * 3 and found[0]["relative"] == pytest.approx(0.2)
