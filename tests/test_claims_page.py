"""docs/claims.py: the page is made of the summaries that are kept, of several machines."""

import json
import runpy
from pathlib import Path
from statistics import NormalDist

import pytest
from small_runs import recipe
from test_results_page import make_run

from fedex_lora.experiments.analysis.runs import read_runs
from fedex_lora.runs.rundir import RunDir

SCRIPT = Path(__file__).parents[1] / "docs" / "claims.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, which keeps its files in a folder of its own."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    found = runpy.run_path(str(SCRIPT))
    changed = found["page"].__globals__
    monkeypatch.setitem(changed, "HERE", tmp_path)
    (tmp_path / "runs.jsonl").touch()
    return found


def some_runs(folder, given):
    for seed, (fedit, fedex) in enumerate([(0.5, 0.6), (0.6, 0.71), (0.7, 0.82)]):
        make_run(folder, given, "fedit", seed, fedit)
        make_run(folder, given, "fedex", seed, fedex)
    make_run(folder, given, "ffa", 0)  # not finished


def test_runs_are_kept_without_their_folders_and_added_up(tmp_path, script):
    given, kept = recipe(tmp_path), tmp_path / "runs.jsonl"
    some_runs(tmp_path / "one-place" / "news", given)
    assert script["add"]([tmp_path / "one-place"], kept).startswith(
        "6 runs added or replaced, 6 in all"
    )
    make_run(tmp_path / "other" / "news", given, "fedit", 0, 0.4)  # again, and
    make_run(tmp_path / "other" / "news", given, "fedit", 7, 0.4)  # one more
    assert script["add"]([tmp_path / "other"], kept).startswith(
        "2 runs added or replaced, 7 in all"
    )
    assert str(tmp_path) not in (tmp_path / "runs.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    scores = {line["run"]: json.loads(line["files"]["results.json"]) for line in lines}
    assert scores["news/fedit-seed0"]["best"]["scores"]["test"]["accuracy"] == 0.4


def test_the_page_has_the_difference_the_seeds_it_takes_and_a_plot(tmp_path, script):
    some_runs(tmp_path / "runs" / "news", recipe(tmp_path))
    script["add"]([tmp_path / "runs"], tmp_path / "runs.jsonl")
    runs = script["unpacked"](tmp_path / "unpacked", tmp_path / "runs.jsonl")
    assert len(runs) == len(read_runs([tmp_path / "runs"])[0]) - 1
    text = "\n".join(script["page"](runs))
    row = next(line for line in text.splitlines() if "test accuracy" in line)
    # differences .10, .11, .12: mean .11, half-width 4.303 x .01 / sqrt(3); the share missed in the
    # last round is 0.2 / 2.0; s = .01 takes 34 seeds (G*Power, paired t-test, d = 0.5)
    assert "+0.110 (+0.085 to +0.135)" in row and "| 34 |" in row and "0.100 ± 0.000" in row
    assert "somewhere" not in text
    assert (tmp_path / "claims.svg").read_text().count("<use") > 3


@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_many_seeds_needed_are_near_the_normal_rule(script, spread):
    normal = NormalDist()
    wanted = ((normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * spread / 0.005) ** 2
    assert wanted < script["seeds_needed"](spread) < wanted + 3


def test_the_deviation_by_layer_matrix_and_round(tmp_path, script):
    given = recipe(tmp_path)
    norms = {"layer.0.query": 1.0, "layer.1.query": 3.0, "layer.0.value": 0.5, "layer.1.value": 0.5}
    none = {"clients": {}, "bytes_up": {}, "bytes_down": {}, "seconds": {"round": 1.0}}
    for seed, rank in ((0, 4), (1, 4), (0, 1)):
        make_run(tmp_path / f"runs{rank}" / "news", given, "fedit", seed, 0.5, lora={"r": rank})
        records = [
            {
                "round": round,
                **none,
                "deviation_by_site": {name: norm / round for name, norm in norms.items()},
                "ideal_by_site": {name: norm * round for name, norm in norms.items()},
            }
            for round in (1, 2)
        ]
        RunDir(tmp_path / f"runs{rank}" / "news" / f"fedit-seed{seed}").write_records(records)
    runs = read_runs([tmp_path / "runs4", tmp_path / "runs1"])[0]
    text = "\n".join(script["layers"](runs, tmp_path / "layers.svg"))
    rows = [line for line in text.splitlines() if line.startswith("| roberta")]
    # deeper over other: Q 3, V 1, so their geometric mean; Q / V = 2 / .5; rounds: 1/2, of ideals
    # that grow as much 1/4
    told = "1.732 ± 0.000 (1.000 ± 0.000) | 4.000 ± 0.000 (1.000 ± 0.000) | 0.500 ± 0.000 (0.250"
    one = told.replace(" ± 0.000", "")
    assert len(rows) == 2 and rows[0].split(" | ")[2] == "1" and "| 1 | " + one in rows[0]
    assert rows[1].split(" | ")[2] == "4" and "| 2 | " + told in rows[1]
    assert "Q, r 1" in (tmp_path / "layers.svg").read_text()


def test_a_method_of_another_rank_stands_beside_the_reference(tmp_path, script):
    given = recipe(tmp_path)
    for method, rank in (("fedit", 2), ("fedit", 4), ("ravan", 8), ("fedex", 4)):
        make_run(tmp_path / f"{rank}" / "news", given, method, 0, 0.5, lora={"r": rank})
    found = script["groups"](read_runs([tmp_path / str(r) for r in (2, 4, 8)])[0])
    names = {
        name.rpartition(" ")[2]: [p.run.recipe.method.name for p in part.placed]
        for name, part in found.items()
    }
    assert names == {"2": ["fedit", "ravan"], "4": ["fedex", "fedit"]}
