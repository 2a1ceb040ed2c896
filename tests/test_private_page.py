"""docs/private.py: scores by budget at what was chosen, and how much of the residual is noise."""

import json
import runpy
from pathlib import Path

import pytest
from small_runs import recipe
from test_results_page import make_run

from fedex_lora.experiments.analysis.runs import read_runs

SCRIPT = Path(__file__).parents[1] / "docs" / "private.py"
PRIVATE = {"example_level": {"epsilon": 8, "delta": 1e-3}}
TWIN = {"example_level": {"noise_multiplier": 0.01, "delta": 1e-3}}


def deviate(folder, first):
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["deviation"] = first
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_page_has_the_chosen_runs_their_differences_and_the_share_that_is_noise(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script, file = runpy.run_path(str(SCRIPT)), tmp_path / "private.jsonl"
    claims = runpy.run_path(str(SCRIPT.with_name("claims.py")))
    given, runs = recipe(tmp_path, privacy={}), tmp_path / "runs"
    rate = {"training": {"learning_rate": 0.5}}  # tried at the first seed alone
    make_run(runs / "other", given, "fedex", 0, 0.1, privacy=PRIVATE, **rate)
    for seed, (fedit, fedex) in enumerate([(0.5, 0.6), (0.6, 0.71), (0.7, 0.82)]):
        make_run(runs / "eight", given, "fedit", seed, fedit, privacy=PRIVATE)
        make_run(runs / "eight", given, "fedex", seed, fedex, privacy=PRIVATE)
        make_run(runs / "twin", given, "fedex", seed, 0.9, privacy=TWIN)
        deviate(runs / "eight" / f"fedex-seed{seed}", 5.0)
        deviate(runs / "twin" / f"fedex-seed{seed}", 3.0)
    make_run(runs / "plain", given, "fedit", 0, 0.8)
    file.touch()
    assert claims["add"]([runs], file).startswith("11 runs added")
    text = "\n".join(script["page"](claims["unpacked"](tmp_path / "unpacked", file)))
    assert "| fedex | 0.710 ± 0.110 (3) | - |" in text
    assert "| fedit | 0.600 ± 0.100 (3) | 0.800 (1) |" in text
    # differences 0.10, 0.11, 0.12: mean 0.11, half-width 4.303 * 0.01 / sqrt(3)
    assert "| fedit | +0.110 (+0.085 to +0.135) | - |" in text
    assert "| fedex | 0.02, 1 (of 2) | - |" in text
    # 1 - (3 / 5)² of the squared deviation
    assert "| ε 8 | 3 | 5.000 ± 0.000 | 3.000 ± 0.000 | 0.640 ± 0.000 |" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("scores", [(0.7, 0.6), (0.6, 0.7)])
def test_of_choices_with_as_many_seeds_validation_tells(tmp_path, monkeypatch, scores):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script, given = runpy.run_path(str(SCRIPT)), recipe(tmp_path, privacy={})
    for rate, score in zip((0.1, 0.5), scores):
        training = {"learning_rate": rate}
        make_run(tmp_path / str(rate), given, "fedex", 0, 0.5, training=training)
        path = tmp_path / str(rate) / "fedex-seed0" / "results.json"
        result = json.loads(path.read_text())
        result["best"]["score"] = score
        path.write_text(json.dumps(result))
    (by_choice,) = script["arms"](read_runs([tmp_path])[0]).values()
    assert script["chosen"](by_choice)[0] == (0.1 if scores[0] > scores[1] else 0.5)
