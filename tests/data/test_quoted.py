"""Errors about rows: the place and forty characters, or all of it where that is asked for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.data.load import load_client
from fedex_lora.data.quoted import about_rows, shortened
from fedex_lora.errors import SHOWN, UserError, Withheld, show_rows, shows_rows
from fedex_lora.recipe import DataSpec, task_spec
from fedex_lora.tasks import build_task

SECRET = "Mrs Miller born 1950 in Aachen insured with the AOK is ill with gout since 1999"


@pytest.fixture(autouse=True)
def put_back():
    yield
    show_rows(False)


def leaked(text, secret=SECRET):
    """The longest piece of the secret that is in the text."""
    for size in range(len(secret), 0, -1):
        if any(secret[i : i + size] in text for i in range(len(secret) - size + 1)):
            return size
    return 0


CLASSES = task_spec(kind="text-classification", labels=["a", "b"])


@pytest.mark.parametrize(
    ("name", "content", "task"),
    [
        ("rows.jsonl", json.dumps({"text": "x", "label": SECRET}), CLASSES),
        ("rows.jsonl", json.dumps({"text": 7, "label": SECRET}), CLASSES),
        ("rows.jsonl", json.dumps({"text": [SECRET], "label": 0}), CLASSES),
        ("rows.jsonl", json.dumps({"text": "x", "label": 0}) + "\n" + SECRET, CLASSES),
        ("rows.csv", f"{SECRET};x\nx;y\n", CLASSES),
        ("rows.csv", f"text,label\nx,{SECRET}\n", CLASSES),
        ("rows.jsonl", json.dumps({"mr": SECRET, "ref": "x"}), task_spec(kind="e2e")),
        ("rows.json", '[{"text": "' + SECRET + '", "label": 0}, 7]', CLASSES),
    ],
)
def test_an_error_about_a_row_shows_little_of_it(name, content, task, tmp_path):
    file = tmp_path / name
    file.write_text(content)

    def told():
        with pytest.raises(UserError) as error:
            load_client(DataSpec(path=tmp_path), build_task(task), 0, "ann", file)
        return str(error.value)

    short = told()
    assert str(file) in short and leaked(short) <= SHOWN
    show_rows(True)
    whole = told()
    assert ("`show_rows=True`" in short) == (whole != short)


@given(st.text(max_size=200), st.sampled_from(["{!r} is no label", "expected 'a', got {!r}."]))
def test_no_quoted_value_is_longer_than_that(value, form):
    text = shortened(form.format(value), [])
    whole = form.format(value)
    assert text == whole if len(repr(value)) <= SHOWN + 2 else len(text) < len(whole) + 4
    assert len(text) <= len(form) + SHOWN + 10


def test_apostrophes_in_sentences_are_no_quotes():
    text = "the task's labels, which aren't those of the file's first column, and aren't known'"
    assert shortened(text, []) == text


def test_it_stays_the_kind_of_error_that_it_was():
    with pytest.raises(Withheld, match=r"x{40}\.\.\."), about_rows():
        raise Withheld(f"line 3: {'x' * 50!r}")
    with pytest.raises(KeyError), about_rows():
        raise KeyError("ours are shortened alone")
    assert not shows_rows()
