"""Files as people have them: every one loads as it is meant, or is refused by the line."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedex_lora.data.load import of_files
from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.conversations import conversations

LABELS: dict[str, Any] = {"kind": "text-classification", "labels": ["bad", "good"]}
CHAT: dict[str, Any] = {"kind": "chat"}
ROWS = [("It is bad", "bad"), ("It is good", "good")]
SAID = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARED = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
PLAIN = [{"text": text, "label": label} for text, label in ROWS]
NUMBERED = [{"text": text, "label": i} for i, (text, _) in enumerate(ROWS)]


def lines(rows: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


CSV = "text,label\nIt is bad,bad\nIt is good,good\n"
LOADED: dict[str, tuple[str, str | bytes]] = {  # form: file, content; each holds ROWS
    "JSON Lines": ("x.jsonl", lines(PLAIN)),
    "capitals in the suffix": ("X.JSONL", lines(PLAIN)),
    "JSON Lines with a byte order mark": ("x.jsonl", b"\xef\xbb\xbf" + lines(PLAIN).encode()),
    "JSON Lines with CRLF": ("x.jsonl", lines(PLAIN, "\r\n")),
    "JSON Lines without a last line end": ("x.jsonl", lines(PLAIN).strip()),
    "JSON Lines with empty lines": ("x.jsonl", "\n" + lines(PLAIN, "\n\n  \n")),
    "JSON Lines with keys in any order": (
        "x.jsonl",
        lines([dict(reversed(row.items())) for row in PLAIN]),
    ),
    "JSON Lines with a key that some rows lack": (
        "x.jsonl",
        lines([PLAIN[0] | {"n": 1}, PLAIN[1]]),
    ),
    "a JSON list on one line": ("x.json", json.dumps(PLAIN)),
    "a JSON list over many lines": ("x.json", json.dumps(PLAIN, indent=2)),
    "a JSON list called .jsonl": ("x.jsonl", json.dumps(PLAIN, indent=2)),
    "JSON objects over many lines": ("x.json", "\n".join(json.dumps(r, indent=1) for r in PLAIN)),
    "labels as numbers": ("x.jsonl", lines(NUMBERED)),
    "labels as numbers that are texts": (
        "x.jsonl",
        lines([row | {"label": str(row["label"])} for row in NUMBERED]),
    ),
    "labels as floats, as pandas writes them": (
        "x.jsonl",
        lines([row | {"label": float(row["label"])} for row in NUMBERED]),
    ),
    "labels of both kinds": ("x.jsonl", lines([NUMBERED[0], PLAIN[1]])),
    "CSV": ("x.csv", CSV),
    "CSV with a byte order mark, as Excel saves it": ("x.csv", b"\xef\xbb\xbf" + CSV.encode()),
    "CSV with CRLF": ("x.csv", CSV.replace("\n", "\r\n")),
    "CSV in UTF-16": ("x.csv", CSV.encode("utf-16")),
    "CSV with semicolons that says so": ("x.csv", "sep=;\n" + CSV.replace(",", ";")),
    "CSV with all fields quoted": (
        "x.csv",
        '"text","label"\n"It is bad","bad"\n"It is good","good"\n',
    ),
    "CSV with empty lines": ("x.csv", CSV.replace("\n", "\n\n")),
    "CSV with pandas' index": (
        "x.csv",
        ",text,label\n0,It is bad,bad\n1,It is good,good\n",
    ),
    "TSV": ("x.tsv", CSV.replace(",", "\t")),
    "Parquet": ("x.parquet", parquet(PLAIN)),
    "JSON Lines, made smaller by gzip": ("x.jsonl.gz", gzip.compress(lines(PLAIN).encode())),
    "TSV, made smaller by gzip": ("x.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode())),
}
TALKS: dict[str, tuple[str, str | bytes]] = {  # the same of conversations; each holds SAID
    "OpenAI's messages": ("x.jsonl", lines([{"messages": SAID}])),
    "messages in parts": (
        "x.jsonl",
        lines(
            [
                {
                    "messages": [
                        m | {"content": [{"type": "text", "text": m["content"]}]} for m in SAID
                    ]
                }
            ]
        ),
    ),
    "messages with names and nulls": (
        "x.jsonl",
        lines([{"messages": [m | {"name": None, "tool_calls": None, "weight": 1} for m in SAID]}]),
    ),
    "ShareGPT": ("x.json", json.dumps([{"id": "a", "conversations": SHARED}], indent=1)),
    "ShareGPT in Parquet": ("x.parquet", parquet([{"conversations": SHARED}])),
    "Alpaca": ("x.json", json.dumps([{"instruction": "2 + 2?", "input": "", "output": "4"}])),
    "Alpaca without input": ("x.jsonl", lines([{"instruction": "2 + 2?", "output": "4"}])),
    "Alpaca in CSV": ("x.csv", "instruction,input,output\n2 + 2?,,4\n"),
    "messages as a JSON text in CSV": (
        "x.csv",
        'messages\n"' + json.dumps(SAID).replace('"', '""') + '"\n',
    ),
}
REFUSED: dict[str, tuple[str, str | bytes, dict[str, Any], str]] = {
    "a comma at the end of a JSON list": (
        "x.json",
        json.dumps(PLAIN)[:-1] + ",\n]",
        LABELS,
        r"x\.json, line 1: .*a comma before the end of the list",
    ),
    "a comma at the end of an object": (
        "x.jsonl",
        lines(PLAIN[:1]) + '{"text": "a", "label": 1,}\n',
        LABELS,
        r"x\.jsonl, line 2: ",
    ),
    "Python's quotes": ("x.jsonl", str(PLAIN[0]) + "\n", LABELS, r"x\.jsonl, line 1: "),
    "a line that was cut off": ("x.jsonl", lines(PLAIN)[:-9], LABELS, r"x\.jsonl, line 2: "),
    "rows within an object": (
        "x.json",
        json.dumps({"data": PLAIN}),
        LABELS,
        r"no column 'text'; there are: data",
    ),
    "pandas' columns within each other": (
        "x.json",
        json.dumps({"text": {"0": "a"}, "label": {"0": 1}}),
        LABELS,
        r"x\.json, line 1: text is .*which is no text",
    ),
    "a label that is nobody's": (
        "x.csv",
        CSV.replace("good,good", "good,fine"),
        LABELS,
        r"x\.csv, line 3: label is 'fine'; expected one of bad, good",
    ),
    "a missing label": (
        "x.jsonl",
        lines([PLAIN[0], {"text": "a"}]),
        LABELS,
        "line 2: label is None",
    ),
    "NaN": ("x.jsonl", '{"text": "a", "label": NaN}\n', LABELS, "line 1: label is nan"),
    "a text that is a number": (
        "x.jsonl",
        lines([PLAIN[0], {"text": 7, "label": 1}]),
        LABELS,
        "line 2: text is 7, which is no text",
    ),
    "CSV with semicolons": (
        "x.csv",
        CSV.replace(",", ";"),
        LABELS,
        r"x\.csv, line 1: .*is the only column.*put a line sep=; before it",
    ),
    "CSV with a comma that is not quoted": (
        "x.csv",
        CSV + "Good, is it?,good\n",
        LABELS,
        r"x\.csv, line 4: 3 field\(s\), where the header has 2",
    ),
    "a quote that is not closed": ("x.csv", CSV + '"It,bad\n', LABELS, r"x\.csv, line 4: "),
    "Latin-1": (
        "x.csv",
        CSV.encode() + "schön,good\n".encode("latin-1"),
        LABELS,
        r"x\.csv, line 4: not UTF-8; save it as UTF-8",
    ),
    "no header": (
        "x.csv",
        "It is bad,bad\n",
        LABELS,
        r"no column 'text'; there are: It is bad, bad|no rows",
    ),
    "a spreadsheet": (
        "x.xlsx",
        b"PK\3\4",
        LABELS,
        "unknown kind of file.*Save a spreadsheet as CSV",
    ),
    "a file that gzip has not made": ("x.csv.gz", CSV, LABELS, "damaged, or not made by gzip"),
    "an empty file": ("x.jsonl", "", LABELS, "the file is empty"),
    "a conversation of the user alone": (
        "x.jsonl",
        lines([{"messages": SAID}, {"messages": SAID[:1]}]),
        CHAT,
        r"x\.jsonl, line 2: a conversation without an assistant",
    ),
    "an unknown role": (
        "x.jsonl",
        lines([{"messages": [{"role": "narrator", "content": "a"}]}]),
        CHAT,
        "line 1: message 1 has the role 'narrator'",
    ),
}


def rows_of(folder: Path, name: str, content: str | bytes, task: dict[str, Any]) -> Any:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return of_files([folder / name], build_task(task_spec(**task)), None, 0, "x")


@pytest.mark.parametrize("form", LOADED)
def test_rows_of_texts_and_labels(form, tmp_path):
    rows = rows_of(tmp_path, *LOADED[form], LABELS)
    names = {"0": "bad", "1": "good", "0.0": "bad", "1.0": "good"}
    found = [
        (text, names.get(str(label), label)) for text, label in zip(rows["text"], rows["label"])
    ]
    assert found == ROWS


@pytest.mark.parametrize("form", TALKS)
def test_conversations(form, tmp_path):
    (one,) = conversations(rows_of(tmp_path, *TALKS[form], CHAT))
    assert one.turns == SAID


def test_line_ends_and_quotes_within_a_field_are_its_own(tmp_path):
    content = 'text,label\n"It is\nso ""bad""",bad\nIt,fine\n'
    with pytest.raises(UserError, match=r"x\.csv, line 4: label is 'fine'"):
        rows_of(tmp_path, "x.csv", content, LABELS)
    rows = rows_of(tmp_path, "x.csv", content.replace("fine", "good"), LABELS)
    assert rows["text"][0] == 'It is\nso "bad"'


@pytest.mark.parametrize("form", REFUSED)
def test_refused_with_the_place(form, tmp_path):
    name, content, task, message = REFUSED[form]
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path, name, content, task)
    assert name in str(caught.value)
