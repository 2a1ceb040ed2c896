"""Rows from every kind of source, what is left out, and what is said about bad ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from fedex_lora.data import load as module
from fedex_lora.data.load import known_labels, load
from fedex_lora.data.stdlib_docs import LABELS
from fedex_lora.errors import UserError
from fedex_lora.recipe import DataSpec, task_spec
from fedex_lora.tasks import build_task

SST2 = build_task(task_spec(kind="glue", name="sst2"))
MNLI = build_task(task_spec(kind="glue", name="mnli"))
TEXT = build_task(task_spec(kind="causal-lm"))


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"sentence": f"row {i}", "label": i % 2, **more} for i in range(count)]


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    for name, split in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    return folder


def test_a_directory(tmp_path):
    write(tmp_path, train=rows(5), validation=rows(3), test=rows(2))
    data = load(DataSpec(path=tmp_path), SST2, seed=0)
    assert data.train is not None and data.train["sentence"][:] == [f"row {i}" for i in range(5)]
    assert data.clients is None
    assert {name: len(split) for name, split in data.evaluation.items()} == {
        "validation": 3,
        "test": 2,
    }
    assert str(tmp_path) in data.description and "train: 5 rows" in data.description


def test_csv_is_read_as_the_task_needs_it(tmp_path):
    own = build_task(task_spec(kind="text-classification", labels=["False", "True"]))
    (tmp_path / "train.csv").write_text("text,label\n2024,True\nNA,False\n1e5,1\n")
    train = load(DataSpec(path=tmp_path), own, 0).train
    assert train is not None and train["text"][:] == ["2024", "NA", "1e5"]
    (tmp_path / "train.csv").write_text("text\n2024\n07\n")
    train = load(DataSpec(path=tmp_path), TEXT, 0).train
    assert train is not None and train["text"][:] == ["2024", "07"]


def test_a_bad_label_in_csv_is_named_by_line(tmp_path):
    (tmp_path / "train.csv").write_text('sentence,label\n"two\nlines",1\nx,2\n')
    with pytest.raises(UserError, match=r"train\.csv, line 4: label is '2'"):
        load(DataSpec(path=tmp_path), SST2, 0)


@pytest.mark.parametrize("label", ["-1", "-1.0", ""])
def test_a_test_split_in_csv_whose_labels_are_held_back_is_left_out(tmp_path, label):
    write(tmp_path, train=rows(4))
    (tmp_path / "test.csv").write_text(f"sentence,label\na,{label}\nb,{label}\n")
    assert load(DataSpec(path=tmp_path), SST2, 0).evaluation == {}


def test_suffixes_in_capitals_and_odd_folders(tmp_path):
    folder = tmp_path / "a [1] *?"
    folder.mkdir()
    write(folder, train=rows(4))
    (folder / "validation.CSV").write_text("sentence,label\nx,0\n")
    (folder / "train.jsonl").rename(folder / "train.JSONL")
    data = load(DataSpec(path=folder), SST2, 0)
    assert data.train is not None and len(data.train) == 4
    assert list(data.evaluation) == ["validation"]


@pytest.mark.parametrize("held_back", [{"label": -1}, {"label": None}])
def test_a_test_split_whose_labels_are_held_back_is_left_out(tmp_path, held_back):
    held = [row | held_back for row in rows(3)]
    write(tmp_path, train=rows(4), validation=rows(2), test=held)
    assert list(load(DataSpec(path=tmp_path), SST2, 0).evaluation) == ["validation"]


def test_a_test_split_without_a_label_column_is_left_out(tmp_path):
    write(tmp_path, train=rows(4), test=[{"sentence": "a"}])
    assert load(DataSpec(path=tmp_path), SST2, 0).evaluation == {}


def test_held_back_labels_for_validation_are_an_error(tmp_path):
    write(tmp_path, train=rows(4), validation=[*rows(3)[:2], {"sentence": "x", "label": -1}])
    with pytest.raises(UserError, match=r"validation\.jsonl, line 3: label is -1"):
        load(DataSpec(path=tmp_path), SST2, 0)


def test_mnli_has_two_validation_splits_in_order(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    write(tmp_path, train=[row], validation_mismatched=[row], validation_matched=[row])
    write(tmp_path, test_matched=[row | {"label": -1}])
    data = load(DataSpec(path=tmp_path), MNLI, 0)
    assert list(data.evaluation) == ["validation_matched", "validation_mismatched"]


def test_samples_are_seeded_and_no_larger_than_what_there_is(tmp_path):
    write(tmp_path, train=rows(50), validation=rows(10), test=rows(40))
    spec = DataSpec(path=tmp_path, train_examples=20, evaluation_examples=20)
    one, again, other = (load(spec, SST2, seed) for seed in (0, 0, 1))
    assert one.train is not None and again.train is not None and other.train is not None
    assert len(set(one.train["sentence"])) == 20
    assert one.train[:] == again.train[:] != other.train[:]
    assert [len(split) for split in one.evaluation.values()] == [10, 20]


def test_a_file_for_each_client(tmp_path):
    write(tmp_path, b=rows(3), a=rows(2))
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    data = load(DataSpec(clients=files), SST2, 0)
    assert data.train is None and data.evaluation == {}
    assert data.clients is not None
    assert [(name, len(part)) for name, part in data.clients.items()] == [("b", 3), ("a", 2)]


def test_with_clients_a_directory_supplies_evaluation_alone(tmp_path):
    (tmp_path / "server").mkdir()
    server = write(tmp_path / "server", validation=rows(4), train=[{"not": "looked at"}])
    write(tmp_path, a=rows(2))
    data = load(DataSpec(clients=[tmp_path / "a.jsonl"], path=server), SST2, 0)
    assert list(data.evaluation) == ["validation"] and data.train is None


def test_clients_of_the_same_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, a=rows(2))
    files = [tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"]
    with pytest.raises(UserError, match="two files are named 'a'"):
        load(DataSpec(clients=files), SST2, 0)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"validation": rows(1)}, r"has no file train .*there is: validation\.jsonl"),
        ({"train": [*rows(3), {"sentence": "x", "label": 2}]}, r"train\.jsonl, line 4: label is 2"),
        (
            {"train": [{"text": "x", "label": 0}]},
            r"train\.jsonl: no column 'sentence'; there are: text, label",
        ),
        (
            {"train": [{"sentence": "x", "label": 0}, {"sentence": None, "label": 0}]},
            r"train\.jsonl, line 2: sentence is missing",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        load(DataSpec(path=write(tmp_path, **splits)), SST2, 0)


def test_a_missing_directory_and_two_files_for_a_split(tmp_path):
    with pytest.raises(UserError, match=r"gone is no directory"):
        load(DataSpec(path=tmp_path / "gone"), SST2, 0)
    write(tmp_path, train=rows(2))
    (tmp_path / "train.csv").write_text("sentence,label\nx,0\n")
    with pytest.raises(UserError, match=r"both train\.jsonl and train\.csv"):
        load(DataSpec(path=tmp_path), SST2, 0)


def test_the_hub(monkeypatch):
    label = ClassLabel(names=["negative", "positive"])
    train = Dataset.from_list(rows(4)).cast_column("label", label)
    test = Dataset.from_list([row | {"label": -1} for row in rows(2)])
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> DatasetDict:
        asked.append((names, options))
        return DatasetDict(train=train, validation=train, test=test)

    monkeypatch.setattr(module.datasets, "load_dataset", load_dataset)
    data = load(DataSpec(name="nyu-mll/glue", config="sst2", revision="abc"), SST2, 0)
    assert asked == [(("nyu-mll/glue", "sst2"), {"revision": "abc"})]
    assert list(data.evaluation) == ["validation"]
    assert data.description.startswith("nyu-mll/glue, config sst2, revision abc, train: 4 rows")


def test_a_hub_that_cannot_be_reached_or_has_no_training_rows(monkeypatch):
    def unreachable(*_: Any, **__: Any) -> DatasetDict:
        raise ConnectionError("no route")

    monkeypatch.setattr(module.datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot load 'a/b' from the hub: no route"):
        load(DataSpec(name="a/b"), SST2, 0)
    only_test = DatasetDict(test=Dataset.from_list(rows(1)))
    monkeypatch.setattr(module.datasets, "load_dataset", lambda *_, **__: only_test)
    with pytest.raises(UserError, match=r"has no split train; it has test"):
        load(DataSpec(name="a/b"), SST2, 0)


def test_the_built_in_source_brings_its_labels():
    spec = DataSpec(source="stdlib-docs", train_examples=60)
    task = build_task(task_spec(kind="text-classification"), known_labels(spec))
    data = load(spec, task, 0)
    assert task.labels == LABELS and known_labels(DataSpec(name="x")) is None
    assert data.train is not None and len(data.train) == 60
    other = build_task(task_spec(kind="text-classification", labels=["a", "b"]))
    with pytest.raises(UserError, match=r"stdlib-docs, .*the classes .* are networking"):
        load(spec, other, 0)


def test_a_task_without_labels_is_evaluated_on_any_split_with_its_columns(tmp_path):
    write(tmp_path, train=[{"text": "a b"}], test=[{"text": "c d"}])
    assert list(load(DataSpec(path=tmp_path), TEXT, 0).evaluation) == ["test"]


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "rte", "qnli", "stsb"])
def test_published_data_load(shared, name):
    path = shared / "data" / name
    data = load(DataSpec(path=path), build_task(task_spec(kind="glue", name=name)), 0)
    assert data.train is not None and len(data.train) > 1000
    there = [split for split in ("validation", "test") if (path / f"{split}.jsonl").exists()]
    assert list(data.evaluation) == there


E2E_ROW = {"mr": "name[Aromi], area[centre]", "ref": "Aromi is in the centre.", "fixed": True}


def named(kind, **more):
    return build_task(task_spec(kind=kind, **more))


@pytest.mark.parametrize(
    "task, row, theirs",
    [
        (
            {"kind": "e2e", "columns": {"meaning_representation": "mr", "human_reference": "ref"}},
            {"meaning_representation": E2E_ROW["mr"], "human_reference": E2E_ROW["ref"]},
            {"mr": E2E_ROW["mr"], "ref": E2E_ROW["ref"]},
        ),
        (
            {"kind": "glue", "name": "mrpc", "columns": {"sentence1": "a", "label": "y"}},
            {"sentence1": "x", "sentence2": "y", "label": 1},
            {"a": "x", "sentence2": "y", "y": 1, "label": "hidden"},
        ),
        (
            {
                "kind": "glue",
                "name": "mrpc",
                "columns": {"sentence1": "sentence2", "sentence2": "b"},
            },
            {"sentence1": "x", "sentence2": "y", "label": 1},
            {"sentence2": "x", "b": "y", "label": 1},
        ),
        (
            {"kind": "math", "columns": {"question": "Frage", "answer": "Antwort"}},
            {"question": "1+1?", "answer": "#### 2"},
            {"Frage": "1+1?", "Antwort": "#### 2"},
        ),
        (
            {"kind": "commonsense", "columns": {"instruction": "q"}},
            {"instruction": "true or false?", "output": "it is true", "answer": "true"},
            {"q": "true or false?", "output": "it is true", "answer": "true"},
        ),
    ],
)
def test_columns_can_be_named_for_every_task(tmp_path, task, row, theirs):
    write(tmp_path, train=[theirs], validation=[theirs], test=[theirs])
    data = load(DataSpec(path=tmp_path), named(**task), 0)
    for rows in (data.train, *data.evaluation.values()):
        assert rows is not None and rows.to_list() == [row]
    assert list(data.evaluation) == ["validation", "test"]


@pytest.mark.parametrize(
    "task, row, message",
    [
        (
            {"kind": "e2e"},
            E2E_ROW,
            "no column 'meaning_representation'; there are: mr, ref, fixed. Rename the column, or "
            "name the right one with task.columns.meaning_representation.",
        ),
        (
            {"kind": "e2e", "columns": {"meaning_representation": "mr", "human_reference": "red"}},
            E2E_ROW,
            "no column 'red', which task.columns.human_reference names; there are: ",
        ),
        ({"kind": "glue", "name": "cola"}, {"text": "a"}, "with task.columns.sentence."),
        ({"kind": "causal-lm"}, {"body": "a"}, "with task.text_column."),
        ({"kind": "math"}, {"q": "a"}, "task.columns, e.g. {question: NAME, answer: NAME}."),
        ({"kind": "commonsense"}, {"instruction": "a"}, "with task.columns.output."),
        (
            {"kind": "text-classification", "labels": ["a", "b"], "text_pair_column": "b"},
            {"text": "a", "label": "a"},
            "no column 'b'; there are: text, label. Rename the column, or name the right one with "
            "task.text_pair_column.",
        ),
        (
            {"kind": "instruction", "prompt": "{q}", "response": "{a}"},
            {"q": "x"},
            "with task.response.",
        ),
    ],
)
def test_the_error_names_the_key_to_set(tmp_path, task, row, message):
    write(tmp_path, train=[row])
    with pytest.raises(UserError, match=re.escape(message)):
        load(DataSpec(path=tmp_path), named(**task), 0)


def test_values_in_errors_are_short(tmp_path):
    write(tmp_path, train=[*rows(2), {"sentence": "x", "label": "secret " * 10**5}])
    with pytest.raises(
        UserError, match=r"line 3: label is 'secret sec.*\.\.\. \(700000 char"
    ) as told:
        load(DataSpec(path=tmp_path), SST2, 0)
    assert len(str(told.value)) < 300
