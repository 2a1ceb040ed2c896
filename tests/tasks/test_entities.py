"""Entities on words and on characters, on tokens, and how they are scored."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel as Named
from datasets import Dataset, Features, Sequence, Value
from tiny import tiny, tokenizer_of
from transformers.modeling_outputs import TokenClassifierOutput

from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.entities import Annotated, Entity, of_words, on_tokens, tags_of

TASK = build_task(task_spec(kind="token-classification", labels=["PER", "LOC"]))
TAGS = tags_of(["PER", "LOC"])
WORDS = {
    "tokens": [["Ann", "saw", "the", "Lazy", "Dog"], ["over"]],
    "tags": [["B-PER", "O", "O", "B-LOC", "I-LOC"], ["O"]],
}
SPANS = [
    {"text": "Ann saw the Lazy Dog", "entities": [(0, 3, "PER"), (12, 20, "LOC")]},
    {"text": "over", "entities": []},
]


@pytest.fixture(scope="module", params=["roberta", "gpt2"])
def tokenizer(request, tmp_path_factory):
    return tokenizer_of(tiny(request.param, tmp_path_factory.mktemp(request.param)))


def labelled(tokenizer, rows, max_length=60) -> list[list[tuple[str, str]]]:
    """Tokens and tags of encoded rows, those that are passed over left out."""
    encoded = TASK.encode(rows, tokenizer, max_length)
    return [
        [
            (tokenizer.decode([token]), TAGS[label])
            for token, label in zip(row["input_ids"], row["labels"])
            if label != -100
        ]
        for row in encoded
    ]


def spans(rows) -> Dataset:
    kinds = ("start", "end", "label")
    return Dataset.from_list(
        [{**row, "entities": [dict(zip(kinds, e)) for e in row["entities"]]} for row in rows]
    )


def test_of_a_word_the_first_token_is_told(tokenizer):
    first, second = labelled(tokenizer, Dataset.from_dict(WORDS))
    assert [tag for _, tag in first] == WORDS["tags"][0]
    assert [text.strip()[:1] for text, _ in first] == ["A", "s", "t", "L", "D"]
    assert [tag for _, tag in second] == ["O"]


def test_of_a_text_every_token_is_told(tokenizer):
    rows = spans(SPANS)
    TASK.check(rows, "x")
    first, _ = labelled(tokenizer, rows)
    inside = "".join(text for text, tag in first if tag.endswith("LOC"))
    assert inside.replace(" ", "") == "LazyDog"  # a token of blanks alone is passed over
    assert [tag for _, tag in first if tag.startswith("B")] == ["B-PER", "B-LOC"]


def test_tags_are_names_or_numbers_or_what_the_data_call_them(tokenizer):
    wanted = labelled(tokenizer, Dataset.from_dict(WORDS))
    numbers = [[TAGS.index(tag) for tag in row] for row in WORDS["tags"]]
    assert labelled(tokenizer, Dataset.from_dict({**WORDS, "tags": numbers})) == wanted
    other = sorted(TAGS)
    named = [[other.index(tag) for tag in row] for row in WORDS["tags"]]
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(Named(names=other))})
    rows = Dataset.from_dict({**WORDS, "tags": named}, features=features)
    TASK.check(rows, "x")
    assert labelled(tokenizer, rows) == wanted


def test_an_i_that_continues_nothing_begins():
    row = of_words(["a", "b", "c"], ["I-PER", "I-PER", "I-LOC"], TAGS)
    assert row.entities == [Entity(0, 3, "PER"), Entity(4, 5, "LOC")]


def test_entities_across_tokens_take_them_whole_and_are_named(tokenizer, caplog):
    text = "In NewYork"
    found, crossing = on_tokens(
        Annotated(text, [Entity(6, 10, "LOC")]), [(0, 2), (2, 7), (7, 10)], TAGS
    )
    assert [TAGS[i] for i in found] == ["O", "B-LOC", "I-LOC"]
    assert crossing == [Entity(6, 10, "LOC")]
    rows = spans([{"text": "It is over", "entities": [(8, 10, "LOC")]}])  # of the token " over"
    labelled(tokenizer, rows)
    assert "1 of 1 entities begin or end within a token, which is theirs as a whole" in caplog.text
    assert "e.g. 'er'" in caplog.text


def test_what_lies_beyond_max_length_is_told(tokenizer, caplog):
    labelled(tokenizer, Dataset.from_dict(WORDS), 6)
    assert "1 entities lie beyond max_length" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "x, line 1: 1 tokens, but 2 tags"),
        ({"tokens": ["a"], "tags": ["B-ORG"]}, "tag 1 is 'B-ORG'; expected one of O, B-PER"),
        ({"tokens": ["a"], "tags": [9]}, "tag 1 is 9"),
        ({"tokens": "a b", "tags": ["O"]}, "the list of tokens is 'a b', which is none"),
        ({"tokens": [""], "tags": ["O"]}, "token 1 is ''"),
        ({"text": "Ann", "entities": [(0, 9, "PER")]}, "from 0 to 9; the text has 3 characters"),
        ({"text": "Ann", "entities": [(2, 2, "PER")]}, "from 2 to 2"),
        ({"text": "Ann", "entities": [(0, 3, "ORG")]}, "label is 'ORG'; expected one of PER, LOC"),
        ({"text": "Ann", "entities": [(0, 2, "PER"), (1, 3, "LOC")]}, "at 0 and 1 overlap"),
        ({"text": " ", "entities": []}, "the text is ' '; expected"),
        ({"words": ["a"]}, r"no column 'tokens'; .*task\.tokens_column"),
    ],
)
def test_bad_rows_are_named(row, message):
    rows = spans([row]) if "entities" in row else Dataset.from_list([row])
    with pytest.raises(UserError, match=message):
        TASK.check(rows, "x")


@pytest.mark.parametrize("labels", [[], ["PER", "PER"], ["B-PER"], ["O"]])
def test_labels_are_classes_of_entities(labels):
    with pytest.raises(ValueError, match="labels"):
        task_spec(kind="token-classification", labels=labels)


class Told(torch.nn.Module):
    """Gives each token the tag that it is told to."""

    def __init__(self, tags) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tags = tags

    def forward(self, input_ids, attention_mask):
        best = torch.tensor([[self.tags.get(int(i), 0) for i in row] for row in input_ids])
        return TokenClassifierOutput(logits=5.0 * torch.nn.functional.one_hot(best, len(TAGS)))


def test_scores_are_of_whole_entities(tokenizer):
    encoded = TASK.encode(Dataset.from_dict(WORDS), tokenizer, 60)
    row = encoded[0]
    told = {i: label for i, label in zip(row["input_ids"], row["labels"]) if label > 0}
    assert TASK.evaluate(Told(told), encoded, tokenizer, 2)["f1"] == 1.0
    shorter = {i: label for i, label in told.items() if TAGS[label] != "I-LOC"}
    scores = TASK.evaluate(Told(shorter), encoded, tokenizer, 2)  # "Lazy" alone is not "Lazy Dog"
    assert scores["precision"] == scores["recall"] == scores["f1"] == 0.5
    assert scores["accuracy"] == pytest.approx(5 / 6)
