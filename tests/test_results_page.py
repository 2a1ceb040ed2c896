"""docs/results.py: the page is made of what runs' files say, unfinished runs among them."""

import runpy
from pathlib import Path

import pytest
from small_runs import recipe

from fedex_lora.errors import UserError
from fedex_lora.rundir import RunDir

SCRIPT = Path(__file__).parents[1] / "docs" / "results.py"


@pytest.fixture(scope="module")
def page():
    return lambda *folders: "\n".join(runpy.run_path(str(SCRIPT))["results"](folders))


def make_run(folder, given, method, seed, score=None):
    raw = given.model_dump(exclude_unset=True) | {"seed": seed, "method": {"name": method}}
    directory = RunDir(folder / f"{method}-seed{seed}")
    directory.create(type(given).model_validate(raw))
    directory.write_json("environment.json", {"python": "3.0", "packages": {"torch": "1.5"}})
    if score is None:
        return
    scores = {"validation": {"accuracy": 0.9}, "test": {"accuracy": score}}
    best = {"scores": scores, "score": 0.9}
    told = {"deviation": 0.25, "bytes_up": 2000, "bytes_down": 3_000_000, "seconds": 7.0}
    rounds = {"rounds": 2, "best_round": 1, "metric": "accuracy", "seed": seed, "method": method}
    description = "/somewhere/else/news, train: 17 rows, test: 4 rows"
    result = {**rounds, **told, "best": best, "last": best, "description": description}
    directory.write_json("results.json", result)
    none = {"clients": {}, "bytes_up": {}, "bytes_down": {}, "seconds": {"round": 1.0}}
    found = {1: {"deviation": 1.0, "ideal": 4.0}, 2: {"deviation": 0.2, "ideal": 2.0}}
    directory.write_records([{"round": round, **none, **f} for round, f in found.items()])


def test_the_page_has_means_differences_with_intervals_and_what_is_unfinished(tmp_path, page):
    given = recipe(tmp_path)
    folder = tmp_path / "news-2rounds"
    for seed, (fedit, fedex) in enumerate([(0.5, 0.6), (0.6, 0.71), (0.7, 0.82)]):
        make_run(folder, given, "fedit", seed, fedit)
        make_run(folder, given, "fedex", seed, fedex)
    make_run(folder, given, "ffa", 0)
    text = page(folder)
    assert "6 finished runs, without these:" in text and "- news-2rounds/ffa-seed0" in text
    assert "## news-2rounds" in text and "somewhere" not in text and "Data: news," in text
    row = next(line for line in text.splitlines() if line.startswith("| fedex |"))
    # differences 0.10, 0.11, 0.12: mean 0.11, half-width 4.303 * 0.01 / sqrt(3)
    assert "| 0.710 ± 0.110 | +0.110 (+0.085 to +0.135) | 0.250 ± 0.000 | 2.0 kB | 3.0 MB |" in row
    assert "- fedex beats fedit by 0.110" in text
    assert "| news-2rounds | 0.250 ± 0.000 | 0.100 ± 0.000 | +0.110 (+0.085 to +0.135) |" in text
    assert "fedex scores higher than fedit: **holds**" in text
    assert "Python 3.0, torch 1.5" in text


def test_a_folder_without_runs_is_an_error(tmp_path, page):
    with pytest.raises(UserError, match="no run there"):
        page(tmp_path)
