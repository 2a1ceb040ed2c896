"""What was measured is measured once, by machine, model and shapes; and no damage stops a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import recipe

from fedex_lora.engines.setup import set_up
from fedex_lora.recipe import Recipe
from fedex_lora.runs.autotune import settle_fuse, settle_precision
from fedex_lora.runs.remembered import MOST, path, remembered


def never() -> tuple[float, float]:
    raise AssertionError("measured again")


def test_seconds_are_measured_once():
    what = {"machine": ["a", 2], "ways": [["float32", 1], ["bfloat16", 1]]}
    assert remembered(what, lambda: (0.3, 0.2)) == ((0.3, 0.2), False)
    assert remembered(dict(reversed(what.items())), never) == ((0.3, 0.2), True)
    assert remembered({**what, "machine": ["b", 2]}, lambda: (1.0, 2.0)) == ((1.0, 2.0), False)
    assert remembered(what, never) == ((0.3, 0.2), True)
    path().unlink()  # forgotten
    assert remembered(what, lambda: (0.1, 0.4)) == ((0.1, 0.4), False)
    assert [p.name for p in path().parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[" * 10**6,
        "[1]",
        '{"version": 1}',
        '{"version": 1, "seconds": []}',
        '{"version": 1, "seconds": {"{}": [1]}}',
        '{"version": 1, "seconds": {"{}": ["fast", 1]}}',
        '{"version": 1, "seconds": {"{}": [NaN, 1]}}',
        '{"version": 1, "seconds": {"{}": [-1, 1]}}',
        '{"version": 2, "seconds": {"{}": [5, 6]}}',
    ],
)
def test_a_damaged_file_is_measured_anew_and_mended(damage):
    path().parent.mkdir(parents=True)
    path().write_text(damage)
    assert remembered({}, lambda: (0.3, 0.2)) == ((0.3, 0.2), False)
    assert remembered({}, never) == ((0.3, 0.2), True)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDEX_LORA_CACHE", str(tmp_path / "file" / "folder"))
    assert remembered({}, lambda: (0.3, 0.2)) == ((0.3, 0.2), False)


def test_of_two_that_measure_at_once_both_take_the_first_ones():
    def late() -> tuple[float, float]:
        remembered({}, lambda: (0.3, 0.2))  # another process was faster
        return 0.2, 0.3

    assert remembered({}, late) == ((0.3, 0.2), False)


def test_the_file_does_not_grow_without_end():
    path().parent.mkdir(parents=True)
    known = {str(i): [i, i] for i in range(MOST)}
    path().write_text(json.dumps({"version": 1, "seconds": known}))
    remembered({"new": 1}, lambda: (0.3, 0.2))
    kept = json.loads(path().read_text())["seconds"]
    assert len(kept) == MOST and "0" not in kept and '{"new": 1}' in kept


def test_it_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDEX_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert path() == tmp_path / "fedex-lora" / "choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path() == tmp_path / ".cache" / "fedex-lora" / "choices.json"


def test_runs_of_the_same_shapes_share_a_choice(tmp_path: Path, monkeypatch):
    asked: list[str] = []

    def few_steps(federation) -> float:
        asked.append(federation.recipe.engine.precision)
        return {"float32": 0.3, "bfloat16": 0.2}[asked[-1]]

    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", few_steps)

    def chosen(**blocks) -> tuple[Recipe, str]:
        auto = {"precision": "auto", "fuse": "auto"}
        whole, told = settle_precision(set_up(recipe(tmp_path, engine=auto, **blocks)))
        whole, more = settle_fuse(whole)
        return whole.recipe, told + more

    first, told = chosen()
    assert asked == ["float32", "bfloat16", "bfloat16", "bfloat16"] and "before" not in told
    asked.clear()
    again, told = chosen(seed=5, method={"name": "fedit"}, lora={"r": 3})
    assert not asked and again.engine == first.engine
    assert told.count(f"as measured before, {path()}") == 2
    batch = {"per_device_train_batch_size": 3}
    chosen(training={"learning_rate": 0.01, **batch})
    assert asked
