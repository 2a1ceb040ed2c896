"""The scorers against the E2E NLG Challenge's own figures, and by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from fedex_lora.errors import UserError
from fedex_lora.tasks import nlg, nlg_ptb

pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(not nlg_ptb.java_runs(), reason="no Java")

TEXTS = ["a b c d", "a c"]
REFERENCES = [
    ["A b c"],
    ["a b d", "a C"],
]  # a 3 times, b and c 2, d 1; ab 2, bc, bd, ac 1; abc, abd


@needs_java
def test_the_figures_are_those_of_the_challenge(shared):
    folder = shared / "data" / "e2e_nlg"
    references: dict[str, list[str]] = {}
    for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        references.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    lines = (folder / "scored_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = [references[row["meaning_representation"]] for row in rows]
    found = nlg.score([row["prediction"] for row in rows], wanted)
    published = json.loads((folder / "scored_outputs.scores.json").read_text())["scores"]
    assert {name: round(value, 4) for name, value in found.total.items()} == published
    assert len(found.rows) == len(rows)
    for name in ("ROUGE_L", "CIDEr"):  # of these the total is the mean
        mean = sum(row[name] for row in found.rows) / len(rows)
        assert mean == pytest.approx(found.total[name])


def test_nist_by_hand():
    one = 2 * math.log2(8 / 3) + 3 * math.log2(8 / 2)  # a, b, c; a, c: of 8 words
    two = math.log2(3 / 2) + math.log2(2 / 1) + math.log2(3 / 1)  # ab, bc; ac
    three = math.log2(2 / 1)  # abc
    assert nlg.nist(TEXTS, REFERENCES) == pytest.approx(one / 6 + two / 4 + three / 2)


def test_nist_counts_a_word_as_often_as_one_reference_has_it():
    found = nlg.nist(["a a a"], [["a a b", "a b b"]])
    bigrams = math.log2(3 / 1)  # a: 3 of 6 words; aa: 1
    assert found == pytest.approx(2 * math.log2(6 / 3) / 3 + bigrams / 2)


def test_nist_of_short_texts():
    assert nlg.nist(["a b"], [["a b c"]]) == pytest.approx(0.5 * math.log2(3))  # 2/3 as long
    length = (3 + 1) / 2  # the mean of a text's references
    factor = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(1 / length) ** 2)
    assert nlg.nist(["a"], [["a b c", "a"]]) == pytest.approx(factor * math.log2(4 / 2))
    assert nlg.nist(["", ""], [["a"], ["b"]]) == 0.0


def test_bleu_by_hand():
    references = [["a b c d e"], ["a b c d", "x"]]
    precisions = [8 / 8, 6 / 6, 4 / 4, 2 / 2]
    assert nlg.bleu(["A b c d", "a b c d"], references) == pytest.approx(
        math.exp(1 - 9 / 8) * math.prod(precisions) ** 0.25
    )
    assert nlg.bleu(["a b c"], [["a b c"]]) == 0.0  # no 4-grams, and no smoothing


@needs_java
def test_texts_that_are_hard_for_line_based_programs():
    texts = ["", "a\nb\u2028c \x85 d", "...", "Café, £20!", "A ||| b", "\U0001f600 x"]
    found = nlg_ptb.tokenise(texts)
    assert found[:3] == ["", "a b c d", ""] and found[3].startswith("café") and len(found) == 6
    assert nlg_ptb.rouge_l(found, [["x"], ["a b c d"], ["x"], ["x"], ["x"], ["x"]]).rows[:3] == [
        0,
        1,
        0,
    ]
    assert nlg_ptb._statistics_of("a ||| b", ["c|||", "d"]) == "SCORE ||| c ||| d ||| a  b"


def test_words_without_any_ngrams_have_no_cider():
    assert nlg_ptb.cider([""], [[""]]) == nlg_ptb.Metric(0.0, [0.0])


@needs_java
def test_meteor_is_closed_whatever_happens(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), nlg_ptb._meteor():
        raise KeyboardInterrupt
    with (
        pytest.raises(UserError, match="METEOR, a program in Java, ended"),
        nlg_ptb._meteor() as ask,
    ):
        started[1].kill()
        started[1].wait()
        ask("SCORE ||| a ||| a")
    assert all(process.poll() is not None and process.stdin.closed for process in started)


@needs_java
@pytest.mark.parametrize("score", [nlg_ptb.meteor, lambda t, r: nlg_ptb.score(t, r)])
def test_a_java_that_fails_is_an_error_with_its_words(monkeypatch, score):
    monkeypatch.setattr(nlg_ptb, "_JAVA", ["java", "-XX:Nonsense"])
    with pytest.raises(UserError, match=r"in Java, ended .*: Error: A fatal exception.*2 GB"):
        score(TEXTS, REFERENCES)


def test_without_java_the_rest_is_scored(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    nlg.has_java.cache_clear()
    for _ in range(2):
        found = nlg.score(TEXTS, REFERENCES)
        assert set(found.total) == {"BLEU", "NIST"} and found.rows == [{}, {}]
    assert caplog.text.count("METEOR, ROUGE_L and CIDEr are left out") == 1
    nlg.has_java.cache_clear()


def test_missing_scorers_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"needs pycocoevalcap.*fedex-lora\[scorers\]"):
        nlg.score(TEXTS, REFERENCES)
