# pyright: reportAttributeAccessIssue=false
"""Texts as tokens: special tokens once, whoever wrote them, and long texts in no long time."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tiny import tiny, tokenizer_of
from tokenizers import processors

from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.encoding import CHARACTERS, shortened

LM = build_task(task_spec(kind="causal-lm"))
SAID = "template writes them: these are not put there once more"


def with_template(folder, single):
    """A tokenizer that puts <s> (0) and </s> (2) around texts as `single` says."""
    tokenizer = tokenizer_of(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokenizer(folder):
    return with_template(folder, "<s> $A")


def rendered(*turns):
    return "<s>" + "".join(f"[INST] {turn} [/INST] yes</s>" for turn in turns)


def test_a_text_that_a_chat_template_has_written_begins_once(tokenizer, caplog):
    texts = [rendered("lazy dog"), "lazy dog", rendered("a", "file")]
    assert tokenizer(texts[0])["input_ids"][:2] == [0, 0]
    encoded = LM.encode(Dataset.from_dict({"text": texts}), tokenizer, 60)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoded["input_ids"][:] == [plain[0], [0, *plain[1]], plain[2]]
    assert encoded["labels"][:] == encoded["input_ids"][:]
    assert "2 of 3 texts have the tokenizer's special tokens around them already" in caplog.text
    assert SAID in caplog.text


def test_a_text_ends_once_too(folder, caplog):
    tokenizer = with_template(folder, "<s> $A </s>")
    texts = [rendered("lazy dog"), "lazy dog</s>", "lazy dog"]
    encoded = LM.encode(Dataset.from_dict({"text": texts}), tokenizer, 60)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoded["input_ids"][:] == [plain[0], [0, *plain[1]], [0, *plain[2], 2]]
    assert "2 of 3 texts" in caplog.text


def test_prompts_and_responses_have_them_once(tokenizer, caplog):
    task = build_task(
        task_spec(kind="instruction", prompt="{ask}", response="{answer}", generate=True)
    )
    rows = Dataset.from_dict(
        {"ask": ["<s>[INST] dog? [/INST]", "dog?"], "answer": ["fox</s>\n", "fox"]}
    )
    encoded = task.encode(rows, tokenizer, 60)
    fox = tokenizer("fox", add_special_tokens=False)["input_ids"]
    for row, text in zip(encoded, rows["ask"]):
        prompt = tokenizer(text.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == [0, *prompt, *fox, 2] and row["response"] == "fox"
    assert caplog.text.count(SAID) == 2


def test_texts_without_are_left_alone_and_nothing_is_said(tokenizer, caplog):
    pairs = build_task(
        task_spec(kind="text-classification", labels=["a", "b"], text_pair_column="t")
    )
    rows = Dataset.from_dict({"text": ["dog", ""], "t": ["", "file"], "label": ["a", "b"]})
    encoded = pairs.encode(rows, tokenizer, 60)
    assert encoded["input_ids"][:] == tokenizer(rows["text"][:], rows["t"][:])["input_ids"]
    assert encoded["input_ids"][0][-2:] == [2, 2]  # an empty second text is no double end
    assert caplog.text == ""


def test_a_classifier_s_columns_stay_of_one_length(tmp_path, caplog):
    tokenizer = tokenizer_of(tiny("bert", tmp_path))
    task = build_task(task_spec(kind="text-classification", labels=["a", "b"]))
    rows = Dataset.from_dict({"text": ["<s>lazy dog</s>", "lazy dog"], "label": ["a", "b"]})
    encoded = task.encode(rows, tokenizer, 60)
    assert encoded[0]["input_ids"] == encoded[1]["input_ids"]
    assert {len(encoded[0][k]) for k in encoded.column_names if k != "labels"} == {
        len(encoded[0]["input_ids"])
    }
    assert "1 of 2 texts" in caplog.text


def test_a_row_of_ten_megabytes_in_one_word_is_cut_before_it_is_tokenised(tokenizer, caplog):
    lengths = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, *rest, **options):
            lengths.extend(map(len, texts))
            return tokenizer(texts, *rest, **options)

    huge = "x" * 10**7
    encoded = LM.encode(Dataset.from_dict({"text": [huge, "lazy dog"]}), Counting(), 40)
    assert len(encoded[0]["input_ids"]) == 40 and max(lengths) == CHARACTERS
    assert f"1 of 2 texts are longer than {CHARACTERS} characters and cut there" in caplog.text
    math = build_task(task_spec(kind="math", compare="string"))
    row = {"question": "1 + 1?", "answer": "2\n#### 2"}
    rows = Dataset.from_list([row, {**row, "answer": huge + " #### 2"}])
    assert len(math.encode(rows, Counting(), 400)) == 1
    assert max(lengths) == CHARACTERS


def test_what_is_cut_off_is_beyond_max_length(tokenizer):
    """Every token of the vocabulary has fewer characters than the bound allows each."""
    longest = max(map(len, tokenizer.get_vocab()))
    (text,) = shortened(["x" * 10**6], tokenizer, 50_000)
    assert len(text) == max(CHARACTERS, 50_000 * longest) < 10**6
