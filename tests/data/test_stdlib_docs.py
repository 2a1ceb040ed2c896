"""The built-in data: clean sentences, balanced, without duplicates, the same every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest
from datasets import Dataset

from fedex_lora.data import stdlib_docs as module
from fedex_lora.data.stdlib_docs import AREAS, LABELS, sentences, stdlib_docs
from fedex_lora.errors import UserError

FINGERPRINT = """
import hashlib, sys
from fedex_lora.data.stdlib_docs import stdlib_docs
text = repr({k: (v["text"][:], v["label"][:]) for k, v in stdlib_docs().items()})
noise = [m for m in ("telnetlib", "nntplib", "ftplib", "lib2to3") if m in sys.modules]
print(hashlib.sha256(text.encode()).hexdigest(), noise)
"""


@pytest.fixture(scope="module")
def docs() -> dict[str, Dataset]:
    return stdlib_docs()


def test_splits_are_balanced_and_large_enough_to_learn_from(docs):
    for split, fewest in {"train": 350, "validation": 50, "test": 50}.items():
        counts = Counter(docs[split]["label"])
        assert sorted(counts) == list(range(len(LABELS)))
        assert len(set(counts.values())) == 1
        assert counts[0] >= fewest


def test_no_sentence_occurs_twice_in_any_area_or_split(docs):
    texts = [text.lower() for split in docs.values() for text in split["text"]]
    assert len(set(texts)) == len(texts)


def test_sentences_are_prose_of_5_to_40_words(docs):
    for text in docs["train"]["text"]:
        assert 5 <= len(text.split()) <= 40
        assert text[0].isupper() and text[-1] in ".!?"
        assert "\n" not in text and ">>>" not in text and "->" not in text


def test_sentences_of_the_sources_land_in_their_area(docs):
    areas = {t: LABELS[i] for s in docs.values() for t, i in zip(s["text"], s["label"])}
    keyword = {"thread": "concurrency", "decimal": "numbers and dates", "archive": "files"}
    for word, area in keyword.items():
        found = Counter(a for t, a in areas.items() if f" {word} " in t)
        assert found.most_common(1)[0][0] == area


def test_another_process_with_another_hash_seed_gives_the_same(docs):
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], env=env, capture_output=True, text=True, check=True
    )
    here = repr({k: (v["text"][:], v["label"][:]) for k, v in docs.items()})
    assert done.stdout.split() == [hashlib.sha256(here.encode()).hexdigest(), "[]"]


def test_no_entry_is_in_two_areas():
    entries = Counter(entry for text in AREAS.values() for entry in text.split())
    assert max(entries.values()) == 1


def test_a_file_named_alone_leaves_its_package():
    files = {area: {f.as_posix() for f in module._files(area)} for area in LABELS}
    (streams,) = (f for f in files["networking"] if f.endswith("asyncio/streams.py"))
    assert streams not in files["concurrency"]
    assert any(f.endswith("asyncio/locks.py") for f in files["concurrency"])


@pytest.mark.parametrize(
    "docstring",
    [
        ">>> Return(the, value) of some function here.\nThat is all there is to it.",
        "Example of a list follows here now:\n    Indented lines are code and not prose.",
        "- Bulleted lists are left out of the data.",
        ":param name: The name of the file to be read.",
        "open(name) -> A new file object that is open.",
        "Too short.",
        "no capital letter at the beginning of this one.",
        "No full stop at the end of this one",
        "Set it with mode='r' or a = b as is usual in code.",
    ],
)
def test_what_is_not_prose_is_left_out(docstring):
    assert sentences(docstring) == []


def test_sentences_are_split_and_their_lines_joined():
    text = "Return the first\nline of it. Raise an error\nif there is none!"
    assert sentences(f"{text}\n\nThis is e.g. a third one.") == [
        "Return the first line of it.",
        "Raise an error if there is none!",
        "This is e.g. a third one.",
    ]


def test_a_python_without_sources_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"only 0 sentences .*networking.* Use another Python"):
        stdlib_docs.__wrapped__()
