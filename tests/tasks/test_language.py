# pyright: reportAttributeAccessIssue=false
"""Language modelling and instructions on tiny models of real architectures."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import tiny, tokenizer_of
from torch.nn import functional

from fedex_lora.errors import UserError
from fedex_lora.model.load import with_padding
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.kinds.instruction import fields

LM = build_task(task_spec(kind="causal-lm"))
TEXTS = ["lazy dog", "A file is opened for reading", "Sockets send bytes", "Numbers, dates"]
ROWS = Dataset.from_dict({"text": TEXTS})
ASK = {"prompt": "Q: {question}\nA: ", "response": "{answer}"}
QUESTIONS = Dataset.from_dict(
    {"question": ["dog?", "the lines?", "a"], "answer": ["fox", "1", "2"]}
)


def instruct(**more):
    return build_task(task_spec(kind="instruction", **{**ASK, **more}))


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral", "gemma2"])
def folder(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tokenizer(folder):
    return tokenizer_of(folder)


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def row_nll(model, ids: list[int], labels: list[int]) -> tuple[float, int]:
    """−Σ log p over the labelled tokens of one row, without any padding, in float64."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double()
    log_p = functional.log_softmax(logits, dim=-1)
    kept = [i for i in range(1, len(ids)) if labels[i] != -100]
    return -sum(log_p[i - 1, ids[i]].item() for i in kept), len(kept)


@pytest.mark.parametrize("task, rows", [(LM, ROWS), (instruct(), QUESTIONS)], ids=["lm", "ask"])
def test_perplexity_weighs_every_token_the_same(model, tokenizer, task, rows):
    encoded = task.encode(rows, tokenizer, 40)
    sums = [row_nll(model, row["input_ids"], row["labels"]) for row in encoded]
    loss = sum(nll for nll, _ in sums) / sum(count for _, count in sums)
    for batch_size in (1, 3):
        scores = task.evaluate(model, encoded, tokenizer, batch_size)
        assert scores["loss"] == pytest.approx(loss, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    reverse = encoded.select(range(len(encoded) - 1, -1, -1))
    assert task.evaluate(model, reverse, tokenizer, 2) == pytest.approx(scores, rel=1e-5)


def test_the_models_own_loss_passes_over_padding(model, tokenizer):
    encoded = LM.encode(ROWS, tokenizer, 40)
    with torch.no_grad():
        own = model.eval()(**LM.collator(tokenizer)([encoded[i] for i in range(4)])).loss.item()
    assert own == pytest.approx(LM.evaluate(model, encoded, tokenizer, 4)["loss"], rel=1e-4)


def test_batches_are_padded_to_the_longest_and_masked(tokenizer):
    encoded = LM.encode(ROWS, tokenizer, 40)
    batch = LM.collator(tokenizer)([encoded[0], encoded[1]])
    length, longest = len(encoded[0]["input_ids"]), len(encoded[1]["input_ids"])
    assert {value.shape for value in batch.values()} == {(2, longest)}
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (longest - length)
    assert batch["labels"][0].tolist() == encoded[0]["input_ids"] + [-100] * (longest - length)


def test_texts_are_cut_at_max_length(tokenizer):
    assert max(len(ids) for ids in LM.encode(ROWS, tokenizer, 5)["input_ids"]) == 5


def test_a_text_of_one_token_is_left_out_and_counted(tokenizer, caplog):
    rows = Dataset.from_dict({"text": ["a", *TEXTS]})
    assert len(LM.encode(rows, tokenizer, 40)) == 4
    assert "1 of 5 rows left out: their text has a single token" in caplog.text
    with pytest.raises(UserError, match="none of the 1 rows can be used"):
        LM.encode(Dataset.from_dict({"text": ["a"]}), tokenizer, 40)


def test_the_loss_of_an_instruction_is_on_response_and_end_only(tokenizer):
    row = instruct().encode(QUESTIONS, tokenizer, 60)[0]
    answered = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(answered[:-1]) == "fox" and answered[-1] == tokenizer.eos_token_id
    prompt = row["input_ids"][: -len(answered)]
    assert tokenizer.decode(prompt) == "Q: dog?\nA: "
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]


def test_prompts_that_fill_max_length_are_left_out_and_counted(tokenizer, caplog):
    task = instruct()
    lengths = [row["labels"].count(-100) for row in task.encode(QUESTIONS, tokenizer, 60)]
    limit = max(lengths)
    encoded = task.encode(QUESTIONS, tokenizer, limit)
    assert len(encoded) == sum(length < limit for length in lengths) < 3
    assert all(set(row["labels"]) != {-100} for row in encoded)
    assert "rows left out: their prompt alone fills max_length" in caplog.text


class Parrot(torch.nn.Module):
    """A model that has learned its answers by heart: one for each prompt."""

    def __init__(self, answers, vocabulary, pad):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))
        self.answers, self.pad = answers, pad

    def generate(self, input_ids, attention_mask, generation_config, **_):
        assert not self.training and not generation_config.do_sample
        assert (attention_mask[:, -1] == 1).all(), "padded on the right"
        prompts = [tuple(row[mask == 1].tolist()) for row, mask in zip(input_ids, attention_mask)]
        new = [torch.tensor(self.answers[prompt]) for prompt in prompts]
        new = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=self.pad)
        return torch.cat([input_ids, new], dim=1)

    def forward(self, input_ids, **_):
        logits = self.weight.expand(*input_ids.shape, -1)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_exact_match_of_generated_answers(tokenizer):
    task = instruct(generate=True)
    encoded = task.encode(QUESTIONS, tokenizer, 60)
    said = ["fox", " 1 ", "3"]  # right, right but for white space, wrong
    prompts = [
        tuple(i for i, label in zip(row["input_ids"], row["labels"]) if label == -100)
        for row in encoded
    ]
    ids = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in said]
    answers = {p: [*a, tokenizer.eos_token_id] for p, a in zip(prompts, ids)}
    parrot = Parrot(answers, len(tokenizer), tokenizer.pad_token_id).train()
    scores = task.evaluate(parrot, encoded, tokenizer, batch_size=2)
    assert scores["exact_match"] == pytest.approx(2 / 3) and parrot.training
    assert scores["loss"] == pytest.approx(math.log(len(tokenizer)))
    assert task.primary == "exact_match" and task.higher_is_better


def test_greedy_answers_do_not_depend_on_the_batch(model, tokenizer):
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    alone = dict(model.eval().generation_config.to_dict())
    generated = []
    for row in instruct().encode(QUESTIONS, tokenizer, 60):
        ids = [i for i, label in zip(row["input_ids"], row["labels"]) if label == -100]
        start = len(ids)
        for _ in range(4):  # by hand: the most likely token, again and again
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        generated.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    rows = Dataset.from_dict({**QUESTIONS[:], "answer": [g or "-" for g in generated]})
    task = instruct(generate=True, max_new_tokens=4)
    encoded = task.encode(rows, tokenizer, 100)
    scores = task.evaluate(model, encoded, tokenizer, batch_size=3)
    assert scores["exact_match"] == sum(bool(g.strip()) for g in generated) / 3
    assert model.generation_config.to_dict() == alone


@pytest.mark.parametrize("folder", ["gpt2", "llama"], indirect=True)
def test_a_trainer_learns_an_answer(model, tokenizer, tmp_path):
    task = instruct(generate=True, max_new_tokens=4)
    rows = Dataset.from_dict({"question": ["dog?", "a"], "answer": ["fox", "fox"]})
    encoded = task.encode(rows, tokenizer, 40)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=2e-2,
        max_steps=40,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(
        model, arguments, train_dataset=encoded, data_collator=task.collator(tokenizer)
    ).train()
    assert task.evaluate(model, encoded, tokenizer, 2)["exact_match"] == 1.0


@pytest.mark.parametrize(
    "task, table, message",
    [
        (LM, {"text": ["a", ""]}, "x, line 2: text is ''; expected a text"),
        (LM, {"text": ["a", None]}, "x, line 2: text is missing"),
        (LM, {"sentence": ["a"]}, "x: no column 'text'; there are: sentence"),
        (instruct(), {"question": ["a"]}, "x: no column 'answer'"),
        (instruct(), {"question": ["a", None], "answer": ["b", "c"]}, "line 2: question is miss"),
        (instruct(), {"question": ["a"], "answer": [[1]]}, "line 1: answer is neither a text"),
        (instruct(), {"question": ["a"], "answer": [" "]}, "line 1: the response is empty"),
        (instruct(prompt="{question}"), {"question": [""], "answer": ["b"]}, "the prompt is empty"),
    ],
)
def test_bad_rows_are_named(task, table, message):
    with pytest.raises(UserError, match=message):
        task.check(Dataset.from_dict(table), "x")


def test_numbers_are_fine_in_templates(tokenizer):
    rows = Dataset.from_dict({"question": ["2+2?"], "answer": [4]})
    task = instruct()
    task.check(rows, "x")
    labels = [label for label in task.encode(rows, tokenizer, 40)[0]["labels"] if label != -100]
    assert tokenizer.decode(labels[:-1]) == "4"


def test_names_with_spaces_and_literal_braces():
    assert fields("{customer rating} {{x}} {a}", "t") == ("customer rating", "a")


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{}", "{0}", "{a!r}", "{a:>5}", "{a:{b}}", "{a", "a}"]
)
def test_templates_take_plain_names_only(template):
    with pytest.raises(UserError, match=r"task\.prompt: .*literally as \{\{"):
        instruct(prompt=template)


def test_a_response_without_fields_is_refused():
    with pytest.raises(UserError, match=r"no \{column\} field; every response"):
        instruct(response="yes")


def test_padding_token(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = tokenizer.pad_token
    assert with_padding(tokenizer).pad_token == (before or tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        with_padding(tokenizer)


def test_a_pretrained_model_finds_its_stories_likelier_than_noise(shared):
    folder = shared / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no stories260k model")
    tokenizer = tokenizer_of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    scores = [
        LM.evaluate(model, LM.encode(Dataset.from_dict({"text": [t]}), tokenizer, 64), tokenizer, 1)
        for t in (text, " ".join(reversed(text.split())))
    ]
    assert scores[0]["perplexity"] < 10 < 50 < scores[1]["perplexity"]
    assert LM.primary == "perplexity" and not LM.higher_is_better
