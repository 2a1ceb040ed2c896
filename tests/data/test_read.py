"""Local files: what is read, which line a row is on, and what is said when it cannot be."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.data import json_file
from fedex_lora.data.read import line_of, read
from fedex_lora.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
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
        ("x.csv", "a;b\n1,2;3\n", r"x\.csv, line 1: 'a;b' .* no comma-sep.* line sep=; before it"),
        ("x.tsv", "a,b\n1,2\n", r"x\.tsv, line 1: 'a,b' .* this is no tab-separated file"),
        ("x.tsv", "a\tb\n1\n", r"x\.tsv, line 2: 1 field\(s\).* Expected a tab-separated file"),
        ("x.csv", "sep=;\na;b\n1,2\n", r"x\.csv, line 3: 1 field\(s\).* a semicolon-separated"),
        ("x.csv", "a\tb\n1\t2\n", r"x\.csv, line 1: .* this is no comma-separated file"),
        ("x.csv", 'a,b\n1,2\n3,"x\n4,y\n', r"x\.csv, line 3: .*Expected a comma-separated"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x\.csv, line 1: two columns are named 'a'"),
        ("x.csv", "a,b\n", r"x\.csv: no rows"),
        ("x.csv", "\n\n", r"x\.csv: no rows"),
        ("x.jsonl", "\n  \n", r"x\.jsonl: no rows"),
        ("x.json", "[]", r"x\.json: no rows"),
        ("x.parquet", "no parquet", r"x\.parquet: cannot be read"),
        ("x.jsonl", "", r"x\.jsonl: the file is empty"),
        *((f"x.{s}", POINTER, r"Git LFS; .*git lfs pull") for s in ("csv", "parquet", "jsonl")),
        ("x.txt", "hello", r"x\.txt: unknown kind of file; expected one of \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, name, text))


def test_a_parquet_file_s_columns_that_cannot_be_read_are_named(tmp_path):
    words, file = pa.array(["a", "b"]), tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([words, words, words], names=["a", "b", "a"]), file)
    with pytest.raises(UserError, match=r"x\.parquet: two columns are named 'a'; rename one"):
        read(file)
    counts = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32()))
    pq.write_table(pa.table({"a": words, "counts": counts}), file)
    with pytest.raises(UserError, match=r"x\.parquet: column 'counts' .* map<.* leave it out"):
        read(file)


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


def test_other_kinds_of_files_that_are_called_texts(tmp_path):
    Dataset.from_dict({"a": ["x"]}).to_parquet(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"x\.csv: is no text but Parquet; .* end with \.parquet"):
        read(tmp_path / "x.csv")
    for content, what in (
        (gzip.compress(b"a\nx\n"), r"gzip made of one; let its name end with \.gz"),
        (b"PK\x03\x04\x14\x00", "a ZIP archive, as spreadsheets are"),
    ):
        for name in ("x.csv", "x.jsonl"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=rf"{name}: is no text but .*{what}"):
                read(tmp_path / name)


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


LINES = '{"a": 1}\n\n{"a": "x", "b": [1]}\n'


@pytest.mark.parametrize(
    "damaged, what",
    [
        ('{"a": 3', "Expecting ',' delimiter"),
        ('{"a": 3}}', "expected an object|Expecting value|Extra data"),
        ('{"a": "\\ud800"}', r"\\ud800 is half a character"),
        ('{"a": {"\\udfff": 1}}', r"\\udfff is half a character"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ('{"a": {"b": 2, "b": 3}}', "the key 'b' is given twice"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested more than 30 deep"),
        ('{"a": ' + '{"k":' * 90_000 + "1" + "}" * 90_000 + "}", "nested more than 30 deep"),
        ('{"a": 1' + "0" * 20 + "}", "a has a whole number of more than 64 bits"),
        ('{"a": 1' + "0" * 5000 + "}", "Exceeds the limit|more than 64 bits"),
        ('{"a": "x\ty"}', "Invalid control character at character"),
        ('{"a": "x\0y"}', "a zero byte"),
        ('{"a": "\\x"}', "Invalid .escape"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": tru}', "Expecting value at character 7"),
        ("3", "expected an object {...}, got 3"),
        ('["a"]', "expected an object {...}, got 'a'"),
    ],
)
@pytest.mark.parametrize("after", ["", LINES])
def test_every_kind_of_damage_is_named_by_its_line(tmp_path, damaged, what, after):
    file = write(tmp_path, "x.jsonl", LINES + damaged + "\n" + after)
    with pytest.raises(UserError, match=f"x.jsonl, line 4: .*({what})") as caught:
        read(file)
    assert len(str(caught.value)) < 400


def test_damage_within_a_list_or_an_object_over_several_lines_is_named(tmp_path):
    file = write(tmp_path, "x.json", '[\n {"a": 1},\n\n {"a":\n  2 "b": 3}]')
    with pytest.raises(UserError, match=r"line 4: .*Expecting ',' .*\(on line 5\)"):
        read(file)
    for text, what in (
        ('[{"a": 1},\n]', r"line 1: .*a comma before the end of the list"),
        ('[{"a": 1}\n{"a": 2}]', r"line 2: .*expected ',' or '\]'"),
        ('[{"a": 1}]\n\n{"a": 2}', r"line 3: .*something follows the list"),
        ('[{"a": 1},\n {"a": 2, "a": 3}]', r"line 2: .*'a' is given twice"),
        ('[{"a": 1},\n 7]', r"line 2: .*expected an object"),
        ('[{"a": 1},\n {"a": 2}', r"line 2: .*expected ',' or"),
    ):
        with pytest.raises(UserError, match=what):
            read(write(tmp_path, "x.json", text))


def test_objects_may_take_several_lines_and_their_lines_are_known(tmp_path):
    text = '{"a": 1} {"a": 2}\n{\n  "a": 3\n}\n\n{"a": 4}'
    for name, whole in (("x.jsonl", text), ("x.json", text)):
        file = write(tmp_path, name, whole)
        assert read(file)["a"][:] == [1, 2, 3, 4]
        assert [line_of(file, i) for i in range(4)] == [1, 1, 2, 6]
    file = write(tmp_path, "x.json", '\n[\n{"a": 1},\n{"a": 2}\n]\n')
    assert read(file)["a"][:] == [1, 2] and [line_of(file, i) for i in (0, 1)] == [3, 4]


TEXTS = [
    "2020-01-01",
    "2020-01-01T10:00:00Z",
    "12:30",
    "12",
    "1e3",
    "true",
    "null",
    "NaN",
    "",
    "\u2028",
]
VALUES = [
    st.sampled_from(TEXTS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.lists(st.sampled_from(TEXTS), max_size=3),
    st.sampled_from(TEXTS) | st.integers(-9, 9) | st.booleans(),  # of several kinds
]


@given(
    st.sampled_from(VALUES).flatmap(
        lambda kind: st.lists(st.none() | kind, min_size=1, max_size=9)
    ),
    st.sampled_from(["x.jsonl", "x.json"]),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.integers(1, 4),
)
def test_values_are_what_is_written(tmp_path_factory, values, name, ascii, encoding, at_once):
    """Nothing is guessed: no dates, no numbers, no missing values."""
    file = tmp_path_factory.mktemp("json") / name
    rows = [json.dumps({"i": i, "a": v}, ensure_ascii=ascii) for i, v in enumerate(values)]
    text = "[" + ",\n".join(rows) + "]" if name == "x.json" else "\n".join(rows)
    file.write_text(text, encoding=encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "AT_ONCE", at_once)
        got = read(file)
    assert got["a"][:] == values and got["i"][:] == [*range(len(values))]
    assert [type(v) for v in got["a"]] == [type(v) for v in values]


def test_a_key_that_comes_late_or_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "AT_ONCE", 2)
    file = write(tmp_path, "x.jsonl", '{"a": 1}\n{}\n{"a": 3, "b": "x"}\n{"b": "y", "a": null}\n')
    assert read(file)[:] == {"a": [1, None, 3, None], "b": [None, None, "x", "y"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_as_it_is_found(tmp_path, encoding, end):
    """With Excel's marks and separators; `é;` shows the encoding, and the lines stay right."""
    rows = {"text": ["é, ü", "a\tb"], "label": ["1", "2"]}
    for name, lines, first in (
        ("x.csv", ["text,label", '"é, ü",1', "a\tb,2"], 2),
        ("x.csv", ["sep=;", "text;label", "é, ü;1", "a\tb;2"], 3),
        ("x.csv", ['"sep=\t"', "text\tlabel", "é, ü\t1", '"a\tb"\t2'], 3),
        ("x.TSV", ["text\tlabel", "é, ü\t1", '"a\tb"\t2'], 2),
        ("x.tsv", ["SEP=|", "text|label", "é, ü|1", "a\tb|2"], 3),
    ):
        file = tmp_path / name
        file.write_bytes(end.join([*lines, ""]).encode(encoding))
        assert read(file)[:] == rows
        assert [line_of(file, i) for i in (0, 1)] == [first, first + 1]


@pytest.mark.parametrize(
    "content, what",
    [
        ("a\nb\n".encode("utf-16-le"), r"line 1: a zero byte \(UTF-16 without a byte order mark"),
        ("a\nb\nc".encode("utf-16")[:-1], r"line 3: not UTF-16"),
        ("a\nb\n".encode("utf-16") + b"\x00\xd8\x41\x00", r"line 3: not UTF-16"),
        (b"a\nb\x00\n", r"line 2: a zero byte"),
        (b"\xef\xbb\xbfa\nb\xff\n", r"line 2: not UTF-8"),
    ],
)
def test_damaged_encodings_are_named_by_line(tmp_path, content, what):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=what):
        read(tmp_path / "x.csv")


@given(st.binary(max_size=60), st.integers(0, 80), st.sampled_from(["jsonl", "json", "csv", "tsv"]))
def test_no_damage_gives_anything_but_a_clear_error(tmp_path_factory, noise, at, suffix):
    file = tmp_path_factory.mktemp("noise") / f"x.{suffix}"
    good = b'{"text": "a b", "label": 1, "x": [1, {"y": null}]}\n{"text": "c", "label": 2}\n'
    file.write_bytes(good[:at] + noise + good[at + len(noise) // 2 :])
    try:
        rows = read(file)
    except UserError as error:
        assert f"x.{suffix}" in str(error)
    else:
        assert [line_of(file, i) for i in range(len(rows))] and len(rows.to_list()) == len(rows)


def test_a_parquet_file_whose_texts_are_damaged_is_said(tmp_path):
    """The bytes of a text may be changed without any check of the format noticing."""
    file = tmp_path / "x.parquet"
    table = pa.table({"text": ["lazy dogs " * 9, "quick foxes " * 9]})
    pq.write_table(table, file, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace(b"foxes quick", b"f\xb3xes quick"))
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read: .*UTF8"):
        read(file)
