"""ROUGE against fractions worked out by hand."""

import json
import logging

import pytest
import transformers
from datasets import Dataset
from pydantic import ValidationError
from tiny import TEXT, tiny, tokenizer_of

from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.outputs import VerdictFile
from fedex_lora.tasks.rouge import rouge

pytest.importorskip("rouge_score")


def test_it_is_the_mean_f1_of_stems():
    """`cats` is `cat`: of 3 and 5 words 3 are common; of 2 and 4 pairs 2. The other has 1 of 2 and
    1 of 1; none of its pairs; its line breaks make sentences of their own."""
    found = rouge(["The cat sat.", "dog\nbird"], ["the cats sat on mats", "bird"])
    assert found["rouge1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["rouge2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    turned = rouge(["a b\nc d"], ["c d\na b"])  # each sentence is there, the order is another
    assert turned["rougeL"] == 0.5 and turned["rougeLsum"] == 1.0


def test_what_it_cannot_count_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert rouge(["猫", "x"], ["猫", "x"])["rouge1"] == 0.5
    assert "1 of 2 references have none of the letters" in caplog.text


@pytest.mark.parametrize("kind, first", [("seq2seq", "bleu"), ("instruction", "exact_match")])
def test_it_is_asked_for_and_selects(kind, first):
    block = {"kind": kind, "prompt": "{a}", "response": "{b}"}
    assert build_task(task_spec(**block, generate=True)).primary == first
    task = build_task(task_spec(**block, generate=True, rouge=True))
    assert task.primary == "rougeL" and task.higher_is_better and first in task.metrics
    with pytest.raises(ValidationError, match="rouge: is of generated texts; set generate: true"):
        task_spec(**block, rouge=True)


@pytest.mark.parametrize("kind, model", [("seq2seq", "t5"), ("instruction", "llama")])
def test_generated_texts_are_scored(kind, model, tmp_path):
    block = {"kind": kind, "prompt": "say {a}", "response": "{b}", "max_new_tokens": 8}
    task = build_task(task_spec(**block, generate=True, rouge=True))
    folder = tiny(model, tmp_path / "model")
    module = getattr(transformers, task.auto_model).from_pretrained(folder)
    rows = Dataset.from_list([{"a": text, "b": "the lines are read"} for text in TEXT])
    tokenizer = tokenizer_of(folder)
    outputs = VerdictFile(tmp_path / "texts.jsonl")
    scores = task.evaluate(module, task.encode(rows, tokenizer, 64), tokenizer, 4, outputs)
    texts = [json.loads(line)["output"] for line in outputs.path.read_text().splitlines()]
    expected = rouge(texts, ["the lines are read"] * 4)
    assert {name: scores[name] for name in expected} == expected
