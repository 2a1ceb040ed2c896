"""docs/results.py: the page is made of what runs' files say, unfinished runs among them."""

import runpy
from pathlib import Path

import pytest
from small_runs import recipe

from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.statistics import Paired, estimate
from fedex_lora.runs.rundir import RunDir

SCRIPT = Path(__file__).parents[1] / "docs" / "results.py"


@pytest.fixture(scope="module", autouse=True)
def beside_it():
    """A script finds what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield


@pytest.fixture(scope="module")
def page():
    return lambda *folders: "\n".join(runpy.run_path(str(SCRIPT))["results"](folders))


def make_run(folder, given, method, seed, score=None, more=None, **blocks):
    raw = given.model_dump(exclude_unset=True) | {"seed": seed, "method": {"name": method}}
    raw |= {name: {**raw[name], **block} for name, block in blocks.items()}
    directory = RunDir(folder / f"{method}-seed{seed}")
    directory.create(type(given).model_validate(raw))
    directory.write_json("environment.json", {"python": "3.0", "packages": {"torch": "1.5"}})
    if score is None:
        return
    scores = {"validation": {"accuracy": 0.9}, "test": {"accuracy": score, **(more or {})}}
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
    assert "| 0.710 ± 0.110 | +0.110 (+0.085 to +0.135) | 0.25 ± 0 | 2.0 kB | 3.0 MB |" in row
    assert "- fedex beats fedit by 0.110" in text
    told = "| news-2rounds | 2 × 1, 0.02 | 0.250 ± 0.000 | 0.100 ± 0.000 | +0.110 (+0.085"
    assert told in text
    assert "Of 1 settings, in 1 fedex beats fedit (news-2rounds)." in text
    assert "fedex scores higher than fedit: **holds**" in text
    assert "Python 3.0, torch 1.5" in text


def test_one_method_s_directories_stand_beside_the_nearest_runs_of_that_method(tmp_path, page):
    given = recipe(tmp_path)
    for seed in range(3):
        for method in ("fedit", "fedex"):
            make_run(tmp_path / "a-base", given, method, seed, 0.5 + seed / 10)
            far = {"training": {"learning_rate": 0.5}}
            make_run(tmp_path / "b-rate", given, method, seed, 0.9, **far)
        # alone, 0.05, 0.061 and 0.072 above the base's; ranks 1, 3 and 16 together are claim 5
        for r in (1, 16):
            score = 0.55 + seed / 9
            make_run(tmp_path / f"r={r}", given, "fedex", seed, score, lora={"r": r})
    text = page(*sorted(p for p in tmp_path.iterdir() if (p / "fedex-seed0").exists()))
    part = text[text.index("## r=1, r=16") : text.index("## fedex against fedit")]
    assert "Beside the same method's runs of a-base." in part
    rows = [line for line in part.splitlines() if line.startswith("| fedex, r")]
    assert [row.split(" | ")[0] for row in rows] == [f"| fedex, r {r}" for r in (1, 3, 16)]
    assert "less fedex, r 3" in part and "+0.061 (+0.034 to +0.089)" in rows[0]
    assert "of ranks 1, 3, 16" in text and "No run of fedit" not in text


def test_every_metric_is_shown_and_exact_aggregation_judged_by_each(tmp_path, page):
    given = recipe(tmp_path)
    for seed in range(3):
        for method, f1, step in (("fedit", 0.3, 0.01), ("fedex", 0.4, 0.02)):
            more = {"f1": f1 + step * seed, "loss": 0.1}
            make_run(tmp_path / "news", given, method, seed, 0.5 + 7 * step * seed, more)
    text = page(tmp_path / "news")
    assert "| method | accuracy | f1 |" in text
    assert "| fedit | 0.570 ± 0.070 | 0.310 ± 0.010 |" in text
    assert "- f1: fedex beats fedit by 0.110" in text
    assert "- No difference seen between fedex and fedit" in text and "- accuracy:" not in text
    assert str(tmp_path) not in text and "\nroberta; LoRA of rank 3" in text


def test_where_more_is_missed_and_gained_is_counted():
    page = runpy.run_path(str(SCRIPT.with_name("results_why.py")))
    pairs = [Paired("fedex", "fedit", estimate({"t": [d, d]})) for d in (0.1, 0.3, 0.2)]
    found = [page["Gain"](str(d), "", [1.0], [0.1 * i], d) for i, d in enumerate(pairs)]
    # by what is missed: 0.1, 0.3, 0.2; two of the three pairs rise
    assert "Of the 3 pairs of settings, in 2 fedex gains more" in page["going_with"](found)


def test_tasks_of_other_kinds_are_claimed_apart(tmp_path, page):
    news, talk = recipe(tmp_path), recipe(tmp_path, "llama", task={"kind": "causal-lm"})
    for seed in range(2):
        for method, score in (("fedit", 0.5), ("fedex", 0.6 + seed / 100)):
            make_run(tmp_path / "news", news, method, seed, score)
            make_run(tmp_path / "talk", talk, method, seed, score)
    text = page(tmp_path / "news", tmp_path / "talk")
    assert "### text-classification: tiny (text-classification)" in text
    assert "### causal-lm: tiny (causal-lm)" in text
    assert text.count("fedex scores higher than fedit") == 2


def test_where_a_model_knows_nothing_nothing_is_compared(tmp_path, page):
    asked = {"kind": "math", "name": "gsm8k", "generate": True}
    for name, scores in {"lost": (0.0, 0.02), "found": (0.0, 0.03)}.items():
        given = recipe(tmp_path / name, "llama", task=asked)
        for method, score in zip(("fedit", "fedex"), scores):
            make_run(tmp_path / name / "runs", given, method, 0, score)
    lost, found = (page(tmp_path / name / "runs") for name in ("lost", "found"))
    assert "show that the path works" in lost and "| fedex | 0 | 0.900 | 0.020 |" in lost
    assert "fedex and fedit" not in lost and "claims" not in lost.split("## runs")[1]
    assert "the path works" not in found and "- fedex and fedit: +0.030 apart" in found


def test_a_folder_without_runs_is_an_error(tmp_path, page):
    with pytest.raises(UserError, match="no run there"):
        page(tmp_path)
