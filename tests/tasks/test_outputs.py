"""Files of generated texts: what they take up again and what they refuse."""

from __future__ import annotations

import json

import pytest

from fedex_lora.errors import UserError
from fedex_lora.tasks.outputs import OutputFile

DECODING, PROMPTS = {"num_beams": 1}, [[1, 2], [3], [4]]


@pytest.fixture
def path(tmp_path):
    """A file with the outputs of two of the three rows."""
    path = tmp_path / "out.jsonl"
    outputs = OutputFile(path, "key")
    assert outputs.begin(DECODING, PROMPTS) == {}
    outputs.add({2: "é\n\u2028", 0: "a"})
    return path


def test_what_was_added_is_there_again(path):
    assert OutputFile(path, "key").begin(DECODING, PROMPTS) == {0: "a", 2: "é\n\u2028"}
    lines = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[1]) == {"row": 2, "output": "é\n\u2028"} and len(lines) == 4


@pytest.mark.parametrize("torn", ['{"row": 1, "outp', '{"row": 1, "output": "b"}'])
def test_a_torn_last_line_is_dropped(path, torn):
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    outputs = OutputFile(path, "key")
    assert set(outputs.begin(DECODING, PROMPTS)) == {0, 2}
    assert path.read_bytes() == whole
    outputs.add({1: "b"})
    assert OutputFile(path, "key").begin(DECODING, PROMPTS)[1] == "b"


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_torn_first_line_is_a_new_beginning(path, kept):
    first = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(first[:kept])
    assert OutputFile(path, "key").begin(DECODING, PROMPTS) == {}
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "key, decoding, prompts, message",
    [
        ("other", DECODING, PROMPTS, "another model or other data"),
        ("key", {"num_beams": 2}, PROMPTS, "another decoding"),
        ("key", DECODING, [[1, 2], [3], [5]], "other prompts"),
        ("other", DECODING, [[1, 2]], "another model or other data and other prompts"),
    ],
)
def test_outputs_of_something_else_are_refused(path, key, decoding, prompts, message):
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"out\.jsonl: holds the outputs of {message}\. .*move"):
        OutputFile(path, key).begin(decoding, prompts)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", "[1]\n", '{"row": 0, "output": "a"}\n', "\x00" * 9, '"key"']
)
def test_other_files_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(UserError, match=r"out\.jsonl: is no file of outputs\. Nothing was changed"):
        OutputFile(path, "key").begin(DECODING, PROMPTS)
    assert path.read_text() == content


@pytest.mark.parametrize("line", ["?", '{"row": 3, "output": "a"}', '{"row": 1}', "", "\x00"])
def test_a_bad_line_is_named(path, line):
    path.write_text(path.read_text(encoding="utf-8") + f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"out\.jsonl, line 4: is no output"):
        OutputFile(path, "key").begin(DECODING, PROMPTS)


def test_verdicts_lie_beside_and_are_not_lost(path):
    outputs = OutputFile(path, "key")
    outputs.begin(DECODING, PROMPTS)
    outputs.verdicts([{"row": 0, "correct": True}, {"row": 1, "correct": False}])
    beside = path.with_name("out.verdicts.jsonl")
    assert [json.loads(line)["correct"] for line in beside.read_text().splitlines()] == [
        True,
        False,
    ]
    path.unlink()
    with pytest.raises(UserError, match=r"out\.verdicts\.jsonl: is there without its outputs"):
        OutputFile(path, "other").begin(DECODING, PROMPTS)
    assert beside.exists() and not path.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: cannot be used: Is a directory"):
        OutputFile(tmp_path / "out", "key").begin(DECODING, PROMPTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: cannot be used: File exists: .*file"):
        OutputFile(tmp_path / "file" / "out", "key").begin(DECODING, PROMPTS)
