"""What labels of several classes, choices and numbers may look like, and how they are scored."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny, tokenizer_of
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from fedex_lora.data.read import read
from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.metrics import OF_LABELS

MULTI = build_task(task_spec(kind="multi-label-classification", labels=["a", "b", "c"]))
CHOICE = build_task(task_spec(kind="multiple-choice"))
NUMBER = build_task(task_spec(kind="text-regression", minimum=-1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tiny("roberta", tmp_path_factory.mktemp("roberta")))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"labels": ["c", "a"]}, [1.0, 0.0, 1.0]),
        ({"labels": [2, 0]}, [1.0, 0.0, 1.0]),
        ({"labels": []}, [0.0, 0.0, 0.0]),
        ({"labels": "c, a"}, [1.0, 0.0, 1.0]),
        ({"labels": '["c", "a"]'}, [1.0, 0.0, 1.0]),
        ({"labels": ""}, [0.0, 0.0, 0.0]),
        ({"a": 1, "b": 0, "c": "1"}, [1.0, 0.0, 1.0]),
        ({"a": "True", "b": "", "c": "0"}, [1.0, 0.0, 0.0]),
    ],
)
def test_several_classes(tokenizer, row, wanted):
    rows = Dataset.from_list([{"text": "dog", **row}])
    MULTI.check(rows, "x")
    assert MULTI.encode(rows, tokenizer, 20)[0]["labels"] == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": ["d"]}, "x, line 1: labels has 'd'; expected a, b, c"),
        ({"labels": [3]}, "labels has 3"),
        ({"labels": None}, "labels is missing; a row of no class has an empty one"),
        ({"labels": 7}, "labels is 7, which is no list"),
        ({"a": 2, "b": 0, "c": 0}, "a is 2; expected 0 or 1"),
        ({"a": 1, "b": 0}, r"no column 'labels'; .*task\.label_column"),
    ],
)
def test_several_classes_that_are_none(row, message):
    with pytest.raises(UserError, match=message):
        MULTI.check(Dataset.from_list([{"text": "dog", **row}]), "x")


class Fixed(torch.nn.Module):
    """Has its logits by heart, in the order of the rows, which are equally long."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=self.logits[: len(input_ids)])


def test_scores_of_several_classes(tokenizer):
    rows = Dataset.from_dict({"text": ["dog"] * 2, "labels": [["a", "b"], ["c"]]})
    encoded = MULTI.encode(rows, tokenizer, 20)
    model = Fixed([[2.0, -2.0, -2.0], [2.0, -2.0, 2.0]])
    scores = MULTI.evaluate(model, encoded, tokenizer, 2)
    # true positives a, c; false a; missed b
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert scores["loss"] == pytest.approx((4 * right + 2 * wrong) / 6)
    assert scores["exact_match"] == 0.0


CHOICES = ["fox", "dog", "C"]


@pytest.mark.parametrize(
    ("label", "place"), [(1, 1), ("1", 1), ("1.0", 1), ("B", 1), ("b", 1), ("dog", 1), ("C", 2)]
)
def test_labels_of_choices(tokenizer, label, place):
    rows = Dataset.from_list([{"question": "Who?", "choices": CHOICES, "label": label}])
    CHOICE.check(rows, "x")
    row = CHOICE.encode(rows, tokenizer, 20)[0]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["input_ids"]]
    assert row["labels"] == place and texts == ["Who?fox", "Who?dog", "Who?C"]
    batch = CHOICE.collator(tokenizer)([row, row])
    assert batch["input_ids"].shape[:2] == (2, 3)


def test_choices_in_columns_and_as_arc_has_them(tokenizer):
    spec = {"kind": "multiple-choice", "choice_columns": ["one", "two"], "label_column": "answer"}
    task = build_task(task_spec(**spec))
    rows = Dataset.from_list([{"question": "Who?", "one": "fox", "two": "dog", "answer": "B"}])
    task.check(rows, "x")
    assert task.encode(rows, tokenizer, 20)[0]["labels"] == 1
    arc = {"text": ["fox", "dog"], "label": ["1", "2"]}
    rows = Dataset.from_list([{"question": "Who?", "choices": arc, "label": "1"}])
    CHOICE.check(rows, "x")
    assert CHOICE.encode(rows, tokenizer, 20)[0]["labels"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "x.jsonl, line 2: label is 3; expected a number from 0 to 2, a letter"),
        ({"label": "D"}, "label is 'D'"),
        ({"label": None}, "label is None"),
        ({"choices": ["a", "b"]}, "2 choices, where the first row has 3"),
        ({"choices": ["a", "", "b"]}, "a choice is ''"),
        ({"choices": ["a", None, "b"]}, "a choice is None"),
        ({"choices": ["a"]}, "expected a list of two or more"),
        ({"question": ""}, "question is ''"),
    ],
)
def test_choices_that_are_none(tmp_path, change, message):
    row = {"question": "Who?", "choices": CHOICES, "label": 0}
    lines = [json.dumps(row), json.dumps(row | change)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        CHOICE.check(read(tmp_path / "x.jsonl"), str(tmp_path / "x.jsonl"))


def test_numbers_as_labels(tokenizer):
    rows = Dataset.from_dict({"text": ["dog"] * 3, "label": ["7.5", "1e3", "-1"]})
    NUMBER.check(rows, "x")
    assert NUMBER.encode(rows, tokenizer, 9)["labels"][:] == [7.5, 1000.0, -1.0]
    for bad in ("-2", "high", "", "nan", "1e39"):
        rows = Dataset.from_dict({"text": ["dog"], "label": [bad]})
        told = f"label is '{bad}'; expected a number of at least -1 that float32 can hold"
        with pytest.raises(UserError, match=told):
            NUMBER.check(rows, "x")
    with pytest.raises(ValueError, match=r"minimum.*below maximum \(-3\)"):
        task_spec(kind="text-regression", minimum=0, maximum=-3)


def test_errors_of_numbers():
    found, wanted = np.array([1.0, 4.0]), np.array([1.0, 0.0])
    assert OF_LABELS["rmse"][0](found, wanted) == pytest.approx(math.sqrt(8))
    assert OF_LABELS["mae"][0](found, wanted) == 2.0
    assert OF_LABELS["mae"][0](np.array([math.nan, 1.0]), wanted) == math.inf


class Uniform(torch.nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids, attention_mask):
        return MaskedLMOutput(logits=self.weight.expand(*input_ids.shape, -1))


def test_masked_tokens(tokenizer):
    task = build_task(task_spec(kind="masked-lm", mask_probability=0.5))
    rows = Dataset.from_dict({"text": ["The quick brown fox jumps over the lazy dog."] * 40})
    assert task.encode_evaluation is not None
    encoded = task.encode_evaluation(rows, tokenizer, 40)
    again = task.encode_evaluation(rows, tokenizer, 40)
    assert encoded.to_list() == again.to_list()
    scores = task.evaluate(Uniform(len(tokenizer)), encoded, tokenizer, 7)
    assert scores["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)
    torch.manual_seed(0)
    batch = task.collator(tokenizer)(task.encode(rows, tokenizer, 40).to_list())
    chosen = batch["labels"] != -100
    words = batch["attention_mask"].sum() - 2 * 40  # without <s> and </s>
    assert chosen.sum() / words == pytest.approx(0.5, abs=0.06)
    hidden = (batch["input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    assert hidden == pytest.approx(0.8, abs=0.06)
    assert not chosen[:, 0].any() and (batch["labels"][chosen] != tokenizer.mask_token_id).all()


def test_of_the_shortest_batch_something_is_masked(tokenizer):
    task = build_task(task_spec(kind="masked-lm", mask_probability=0.01))
    encoded = task.encode(Dataset.from_dict({"text": ["a"]}), tokenizer, 40)
    batch = task.collator(tokenizer)(encoded.to_list())
    assert (batch["labels"] != -100).sum() == 1


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    tokenizer = tokenizer_of(tiny("gpt2", tmp_path / "gpt2"))
    task = build_task(task_spec(kind="masked-lm"))
    with pytest.raises(UserError, match=r"has no mask token; take .*causal-lm"):
        task.encode(Dataset.from_dict({"text": ["dog"]}), tokenizer, 40)
