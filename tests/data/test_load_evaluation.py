"""Evaluation splits that come from elsewhere than the training rows: `data.evaluation`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedex_lora.data import load as module
from fedex_lora.data.load import load
from fedex_lora.errors import UserError
from fedex_lora.recipe import DataSpec, task_spec
from fedex_lora.tasks import build_task

TASK = build_task(task_spec(kind="math", name="metamath"))
TRAIN = {"query": "1+1?", "response": "The answer is: 2"}
GSM8K = {"question": "2+3?", "answer": "#### 5"}


def write(file: Path, *rows: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_files_add_splits_and_replace_them(tmp_path):
    write(tmp_path / "train.jsonl", TRAIN)
    write(tmp_path / "test.jsonl", TRAIN)
    other = str(write(tmp_path / "other.jsonl", GSM8K, GSM8K))
    spec = DataSpec(path=tmp_path, evaluation={"test_gsm8k": other, "test": other})
    data = load(spec, TASK, 0)
    assert {name: len(rows) for name, rows in data.evaluation.items()} == {
        "test": 2,
        "test_gsm8k": 2,
    }
    assert f"test_gsm8k: 2 rows of {other}" in data.description


def test_with_a_file_for_each_client(tmp_path):
    file = write(tmp_path / "ann.jsonl", TRAIN)
    spec = DataSpec(clients=[file], evaluation={"validation": str(file)})
    assert list(load(spec, TASK, 0).evaluation) == ["validation"]


@pytest.mark.parametrize(
    "source, asked",
    [
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:main@train", ("openai/gsm8k", "main", "train")),
        ("HuggingFaceH4/MATH-500", ("HuggingFaceH4/MATH-500", None, "test")),
    ],
)
def test_data_sets_of_the_hub(tmp_path, monkeypatch, source, asked):
    seen: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Dataset:
        seen.append((name, config, split))
        return Dataset.from_list([GSM8K])

    monkeypatch.setattr(module.datasets, "load_dataset", load_dataset)
    write(tmp_path / "train.jsonl", TRAIN)
    data = load(DataSpec(path=tmp_path, evaluation={"test": source}), TASK, 0)
    assert seen == [asked] and len(data.evaluation["test"]) == 1


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def unreachable(*_: Any, **__: Any) -> Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr(module.datasets, "load_dataset", unreachable)
    write(tmp_path / "train.jsonl", TRAIN)
    with pytest.raises(UserError, match=r"data\.evaluation\.test: cannot load 'a/b:c' .*no route"):
        load(DataSpec(path=tmp_path, evaluation={"test": "a/b:c"}), TASK, 0)


@pytest.mark.parametrize(
    "evaluation, message",
    [
        ({"test_gsm": "x.jsonl"}, r"no evaluation split of the task.*did you mean 'test_gsm8k'"),
        ({"test": "gone.jsonl"}, r"gone\.jsonl: no such file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, evaluation, message):
    write(tmp_path / "train.jsonl", TRAIN)
    with pytest.raises(UserError, match=message):
        load(DataSpec(path=tmp_path, evaluation=evaluation), TASK, 0)


def test_rows_the_task_cannot_use_are_named(tmp_path):
    write(tmp_path / "train.jsonl", TRAIN)
    bad = str(write(tmp_path / "bad.jsonl", GSM8K, {**GSM8K, "answer": ""}))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: no problem with a solution"):
        load(DataSpec(path=tmp_path, evaluation={"test": bad}), TASK, 0)
