"""Rows on disk, mapped into memory: the same as in memory, and not in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from safetensors.torch import load_file
from small_runs import StopAfter, recipe
from tiny import tiny, tokenizer_of

from fedex_lora.data import csv_file, json_file, stored
from fedex_lora.data.read import read
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import DataError, StorageError
from fedex_lora.recipe import Recipe, task_spec
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.tasks import build_task


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many rows at a time, everywhere."""
    for module in (stored, json_file, csv_file):
        monkeypatch.setattr(module, "AT_ONCE", 2)
    monkeypatch.setattr(stored, "ENCODED", 2)
    return 2


ROWS = [
    {"a": 1, "b": "x"},
    {"a": 2},
    {"a": 2.5, "c": {"d": [1]}},
    {"a": 3, "b": None, "c": {"e": "y"}},
    {"c": {"d": [2]}, "f": "1"},
    {"f": 5, "g": []},
    {"f": [True], "g": [1]},
]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS),
    "rows.csv": "a,,b\n1,2,3\n,,\nx,y,z\n1,2,3\n5,6,7\n",
}


@pytest.mark.parametrize("name", [*FILES, "rows.parquet"])
def test_rows_are_those_in_memory(name, few, tmp_path):
    file = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_dict({"a": list(range(7)), "b": [["x"]] * 7}).to_parquet(str(file))
    else:
        file.write_text(FILES[name])
    rows, there = read(file, on_disk=True), read(file)
    assert rows.features == there.features and rows.to_list() == there.to_list()
    assert rows.cache_files and not there.cache_files  # of files that are mapped


def test_damage_is_named_by_line(few, tmp_path):
    for name, text in (
        ("a.jsonl", '{"a": 1}\n' * 4 + "{\n"),
        ("a.csv", "a,b\n" + "1,2\n" * 3 + "1"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}, line 5"):
            read(tmp_path / name, on_disk=True)


def test_a_damaged_file_is_not_taken_for_a_full_disk(few, tmp_path, monkeypatch):
    """Nor the other way round."""
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 9)[:-5])
    with pytest.raises(StorageError, match=r"a\.csv\.gz: damaged"):
        read(tmp_path / "a.csv.gz", on_disk=True)
    monkeypatch.setattr(stored, "folder", lambda: tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"rows cannot be kept there: .* Set TMPDIR"):
        stored.stored([pa.table({"a": [1]})])


def test_neither_rows_nor_tokens_are_held(tmp_path, monkeypatch):
    """Arrow's own count of the bytes that it holds; a mapped file is none of them."""
    monkeypatch.setattr(stored, "ENCODED", 500)
    monkeypatch.setattr(json_file, "AT_ONCE", 500)
    tokenizer = tokenizer_of(tiny("llama", tmp_path / "model"))
    task = build_task(task_spec(kind="causal-lm"))
    line = json.dumps({"text": "lines are read " * 20}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 1500)
    seen: list[int] = []

    def encode(rows, *rest):
        seen.append(len(rows))
        return task.encode(rows, *rest)

    def held(on_disk: bool) -> tuple[Dataset, Dataset, int]:
        before = pa.total_allocated_bytes()
        rows = read(tmp_path / "a.jsonl", on_disk)
        task.check(rows, "a.jsonl")
        if on_disk:
            tokens = stored.encoded(encode, rows, tokenizer, 128)
        else:
            tokens = task.encode(rows, tokenizer, 128)
        return rows, tokens, pa.total_allocated_bytes() - before

    there, tokens, all_of_them = held(on_disk=False)
    rows, mapped, few = held(on_disk=True)
    assert few < all_of_them / 20 and all_of_them > 1500 * (len(line) - 20)
    assert seen == [500] * 3
    assert mapped.cache_files and mapped[1499] == tokens[1499] and len(rows) == len(there)
    assert mapped.features == tokens.features


def test_rows_that_are_left_out(few, tmp_path):
    """A part of which nothing is left is none; nothing left of all is an error."""
    tokenizer = tokenizer_of(tiny("llama", tmp_path / "model"))
    task = build_task(task_spec(kind="instruction", prompt="{a}", response="{b}"))
    rows = Dataset.from_dict({"a": ["x" * 99] * 2 + ["x"] * 3, "b": ["y"] * 5})
    assert len(stored.encoded(task.encode, rows, tokenizer, 16)) == 3
    with pytest.raises(DataError, match="none of the 2 rows can be used"):
        stored.encoded(task.encode, rows.select([0, 1]), tokenizer, 16)


def on_disk(made: Recipe) -> Recipe:
    raw = made.model_dump(exclude_unset=True)
    raw["data"]["keep_in_memory"] = False
    return Recipe.model_validate(raw)


def factors(run: Path) -> dict[str, list[float]]:
    found = load_file(run / "final" / "adapter" / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in found.items()}


def test_a_run_has_the_same_bits_also_once_resumed(few, tmp_path):
    made = recipe(tmp_path)
    start_run(made, tmp_path / "memory")
    with pytest.raises(KeyboardInterrupt):
        start_run(on_disk(made), tmp_path / "resumed", StopAfter(1))
    resume_run(tmp_path / "resumed")
    assert factors(tmp_path / "memory") == factors(tmp_path / "resumed")


def test_clients_rows_and_tokens_are_mapped(few, tmp_path):
    for name, rows in set_up(on_disk(recipe(tmp_path))).clients.items():
        assert rows.cache_files and "fedex-lora-rows-" in rows.cache_files[0]["filename"], name
