"""Rows, tokenizer or pretrained weights that changed in place between two parts of a run."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import recipe
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.engines.digests import rows_digest
from fedex_lora.errors import StorageError
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.watch import Silent


class Noted(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if "not as when the run began" in text:
            self.notes.append(text)


def changed_weights(folder: Path) -> None:
    file = folder / "roberta" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("query.weight"))
    tensors[name][0, 0] += 2**-6
    save_file(tensors, file, {"format": "pt"})


def changed_row(folder: Path, name: str) -> None:
    file = folder / "data" / f"{name}.jsonl"
    first, *rest = file.read_text().splitlines()
    row = json.loads(first)
    file.write_text("\n".join([json.dumps({**row, "label": (row["label"] + 1) % 3}), *rest]) + "\n")


@pytest.fixture
def half(tmp_path):
    """A run of two rounds, one of them played."""
    spec = recipe(tmp_path)
    start_run(spec, tmp_path / "run", most=1)
    return tmp_path


def test_a_run_that_goes_on_with_what_it_began_with_says_nothing(half):
    watcher = Noted()
    resume_run(half / "run", watcher=watcher)
    assert watcher.notes == []
    found = json.loads((half / "run" / "sources.json").read_text())
    assert [*found["rows"]] == [
        *(f"training rows of {name}" for name in ("ann", "bob", "cleo")),
        *(f"evaluation rows of {split}" for split in ("validation", "test")),
    ]
    assert found["changes"] == []


def test_rows_that_changed_are_told_and_kept(half):
    changed_row(half, "bob")
    changed_row(half, "test")
    watcher = Noted()
    resume_run(half / "run", watcher=watcher)
    told = [note.partition(":")[0] for note in watcher.notes]
    assert told == ["evaluation rows of test", "training rows of bob"]
    changes = json.loads((half / "run" / "sources.json").read_text())["changes"]
    assert changes == [{"after_round": 1, "what": told}]
    changed_row(half, "ann")
    output = CliRunner().invoke(app, ["evaluate", str(half / "run")]).output
    assert "training rows of ann: not as when the run began" in output.replace("\n", " ")
    assert "of bob" not in output


def test_other_pretrained_weights_below_what_was_trained_are_refused(half):
    changed_weights(half)
    for use in (resume_run, open_run):
        with pytest.raises(StorageError, match=r"model\.name: .* has other pretrained weights"):
            use(half / "run")
    assert json.loads((half / "run" / "sources.json").read_text())["changes"] == []


def test_a_run_of_before_there_were_digests_goes_on(half):
    (half / "run" / "sources.json").unlink()
    changed_weights(half)
    open_run(half / "run")
    resume_run(half / "run")
    assert (half / "run" / "sources.json").is_file()


def test_a_damaged_file_is_named(half):
    (half / "run" / "sources.json").write_text('{"weights": 3}')
    with pytest.raises(StorageError, match=r"sources\.json: damaged .*; delete the file"):
        resume_run(half / "run")


VALUES = st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5)


@given(VALUES, VALUES)
def test_rows_have_one_digest_if_and_only_if_they_are_equal(one, other):
    first, second = (
        Dataset.from_dict({"ids": rows, "n": [1] * len(rows)}) for rows in (one, other)
    )
    assert (rows_digest(first) == rows_digest(second)) == (one == other)


def test_the_digest_of_rows_is_that_of_their_values_however_they_are_stored(tmp_path):
    rows = Dataset.from_dict({"ids": [[1, 2], [3], []] * 700, "x": [0.5, None, 2.0] * 700})
    doubled = Dataset.from_dict({"ids": [[0], *rows["ids"]], "x": [9.0, *rows["x"]]})
    part = doubled.select(range(1, 2101))  # its buffers begin elsewhere
    shuffled = rows.select([*reversed(range(2100))]).select([*reversed(range(2100))])
    rows.save_to_disk(tmp_path / "rows")
    stored = Dataset.load_from_disk(str(tmp_path / "rows"))
    formatted = rows.select_columns(["ids", "x"]).with_format("torch")
    found = {rows_digest(r) for r in (rows, part, shuffled, stored, formatted)}
    assert found == {rows_digest(rows)}
    assert torch.is_tensor(formatted[0]["ids"])  # its own format is as before
