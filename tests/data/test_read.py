"""Local files: what is read, which line a row is on, and what is said when it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset

from fedex_lora.data.read import line_of, read
from fedex_lora.errors import UserError

ROWS = {"text": ["None", "a, b", "two\nlines"], "label": [0, 1, 0]}


def write(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows, file = Dataset.from_dict(ROWS), tmp_path / f"x.{suffix}"
    if suffix == "csv":
        rows.to_csv(file)
    elif suffix == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_json(file, lines=suffix == "jsonl", orient="records")
    labels = ["0", "1", "0"] if suffix == "csv" else ROWS["label"]  # in CSV all is text
    assert read(file)[:] == ROWS | {"label": labels}
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_changed_file_is_read_again(tmp_path):
    file = write(tmp_path, "x.jsonl", '{"a": 1}\n')
    assert read(file)["a"][:] == [1]
    stat = file.stat()
    write(tmp_path, "x.jsonl", '{"a": 2}\n')
    os.utime(file, (stat.st_atime, stat.st_mtime))
    assert read(file)["a"][:] == [2]


def test_lines_of_rows(tmp_path):
    jsonl = write(tmp_path, "x.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n')
    csv = write(tmp_path, "x.CSV", '\ufeffa,b\n1,"two\nlines"\n\n2,x\n3,y\n')
    assert read(jsonl)["a"][:] == [1, 2] and [line_of(jsonl, i) for i in (0, 1)] == [2, 5]
    assert read(csv)["a"][:] == ["1", "2", "3"] and [line_of(csv, i) for i in (0, 1, 2)] == [
        2,
        5,
        6,
    ]
    assert line_of(tmp_path / "x.parquet", 4) == 5


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 2\n', r"x\.jsonl, line 3: cannot be read"),
        ("x.jsonl", '"a"\n{"a": 2}\n', r"x\.jsonl, line 1: cannot be read"),
        ("x.csv", "a,b\n5,6\n1,2,3\n", r"x\.csv, line 3: 3 field\(s\), where the header has 2"),
        ("x.csv", 'a,b\n"5\n5",6\n\n1\n', r"x\.csv, line 5: 1 field\(s\), where the header has 2"),
        ("x.csv", "a;b\n1,2;3\n", r"x\.csv, line 1: 'a;b' .* this is no comma-separated file"),
        ("x.csv", "a\tb\n1\t2\n", r"x\.csv, line 1: .* this is no comma-separated file"),
        ("x.csv", 'a,b\n1,2\n3,"x\n4,y\n', r"x\.csv, line 3: .*Expected a comma-separated"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x\.csv, line 1: two columns are named 'a'"),
        ("x.csv", "a,b\n", r"x\.csv: no rows"),
        ("x.csv", "\n\n", r"x\.csv: no rows"),
        ("x.jsonl", "\n  \n", r"x\.jsonl: no rows"),
        ("x.json", "[]", r"x\.json: no rows"),
        ("x.parquet", "no parquet", r"x\.parquet: cannot be read"),
        ("x.jsonl", "", r"x\.jsonl: the file is empty"),
        ("x.txt", "hello", r"x\.txt: unknown kind of file; expected one of \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, name, text))


@pytest.mark.parametrize("name", ["a[0-9]/x.jsonl", "[1]/x[!a].csv", "*/?.parquet"])
def test_names_are_no_patterns(tmp_path, name):
    file = tmp_path / name
    (tmp_path / "a1").mkdir()
    write(tmp_path / "a1", "x.jsonl", '{"a": "a neighbour"}\n')
    file.parent.mkdir()
    rows = Dataset.from_dict({"a": ["x"]})
    {".csv": rows.to_csv, ".parquet": rows.to_parquet, ".jsonl": rows.to_json}[file.suffix](file)
    assert read(file)[:] == {"a": ["x"]}


def test_in_csv_all_is_text(tmp_path):
    file = write(tmp_path, "x.csv", "text,label,n\n2024,True,\nNA,False,1.0\nnull,,007\n")
    assert read(file)[:] == {
        "text": ["2024", "NA", "null"],
        "label": ["True", "False", ""],
        "n": ["", "1.0", "007"],
    }


def test_long_texts_and_columns_without_a_name(tmp_path):
    file = write(tmp_path, "x.csv", f",text,\n0,{'x' * 200_000},\n")
    assert read(file)[:] == {"text": ["x" * 200_000]}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_what_is_not_utf_8_is_said(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(b'\n{"a": "caf\xe9"}\n')
    with pytest.raises(UserError, match=rf"x\.{suffix}, line 2: not UTF-8; save it as UTF-8"):
        read(file)


def test_parquet_without_rows(tmp_path):
    Dataset.from_dict({"a": []}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: no rows"):
        read(tmp_path / "x.parquet")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        read(tmp_path / "gone.jsonl")


def test_reading_is_silent(tmp_path, capfd, caplog):
    assert len(read(write(tmp_path, "x.jsonl", '{"a": 1}\n'))) == 1
    with pytest.raises(UserError):
        read(write(tmp_path, "y.jsonl", "{"))
    assert capfd.readouterr().err == "" and caplog.text == ""
