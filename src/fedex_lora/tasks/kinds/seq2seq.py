"""From one text to another with an encoder and a decoder (T5, BART): the loss is over the response.

`max_length` is of the prompt, `max_target_length` of the response; both are cut there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from fedex_lora.errors import check_installed
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks import rouge
from fedex_lora.tasks.base import (
    IGNORED,
    Prediction,
    Task,
    by_length,
    evaluating,
)
from fedex_lora.tasks.encoding import encode_texts, token_collator
from fedex_lora.tasks.generation import Decoding, generate_from_encoded, matched
from fedex_lora.tasks.kinds.instruction import (
    Templates,
    blank_templates,
    check_templates,
    records,
    templates_of,
)
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, functional, nn
from fedex_lora.tasks.metrics import LOSS, PERPLEXITY, SHARE, perplexity
from fedex_lora.tasks.outputs import Outputs


class Seq2Seq(TaskSpec):
    prompt: str  # template with {column} fields
    response: str  # template with at least one such field
    max_target_length: int = Field(default=128, ge=4)
    generate: bool = (
        False  # generate responses when evaluating, and score BLEU, chrF, exact matches
    )
    rouge: bool = False  # ROUGE of these too, of which rougeL selects the best round
    max_new_tokens: int = Field(default=64, ge=1, le=10**7)
    num_beams: int = Field(default=1, ge=1, le=1000)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from rouge.problems(self.rouge, self.generate)

    def build(self, labels: Sequence[str] | None) -> Task:
        templates = templates_of(self.prompt, self.response)
        metrics = {"perplexity": PERPLEXITY, "loss": LOSS}
        decoding = Decoding(self.max_new_tokens, self.num_beams)
        if self.generate:
            check_installed("sacrebleu", "task.generate", "or set task.generate: false")
            metrics = {"bleu": SHARE, "chrf": SHARE, "exact_match": SHARE, **metrics}
        metrics = {**rouge.asked(self.rouge), **metrics}
        return Task(
            name="seq2seq",
            auto_model="AutoModelForSeq2SeqLM",
            peft_task_type="SEQ_2_SEQ_LM",
            columns=templates.columns,
            evaluation_splits=("validation", "test"),
            primary=next(iter(metrics)),
            metrics=metrics,
            check=partial(check_templates, templates),
            encode=partial(_encode, templates, self.max_target_length),
            collator=token_collator,  # the model itself makes the decoder's inputs of the labels
            evaluate=partial(_evaluate, decoding if self.generate else None, self.rouge),
            prediction=Prediction(
                blank=partial(blank_templates, templates), tell=partial(_tell, decoding)
            ),
        )


register_task("seq2seq", Seq2Seq)


def _encode(
    templates: Templates,
    target_length: int,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    found = list(records(rows, templates.columns))
    asked = [templates.prompt.format_map(row) for row in found]
    answers = [templates.response.format_map(row) for row in found]
    encoding = encode_texts(asked, None, tokenizer, max_length)
    labels = encode_texts(answers, None, tokenizer, target_length)["input_ids"]
    return Dataset.from_dict({**encoding, "labels": labels, "response": answers})


def _evaluate(
    decoding: Decoding | None,
    with_rouge: bool,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    loss = _loss(model, encoded, tokenizer, batch_size)
    scores = {"perplexity": perplexity(loss), "loss": loss}
    if decoding is None:
        return scores
    prompts, references = encoded["input_ids"][:], encoded["response"][:]
    found = generate_from_encoded(model, tokenizer, prompts, decoding, batch_size, outputs)
    share = matched(tokenizer, prompts, found, references, outputs)
    from sacrebleu import corpus_bleu, corpus_chrf  # noqa: PLC0415 - optional

    return {
        **(rouge.rouge(found, references) if with_rouge else {}),
        "bleu": corpus_bleu(found, [references]).score / 100,
        "chrf": corpus_chrf(found, [references]).score / 100,
        "exact_match": share,
        **scores,
    }


def _tell(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    decoding = decoding.of_at_most(max_new_tokens)
    prompts = encoded["input_ids"][:]
    texts = generate_from_encoded(model, tokenizer, prompts, decoding, batch_size)
    return [{"prediction": text} for text in texts]


def _loss(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> float:
    """The mean of −log p over all tokens of all responses."""
    collate, total, count = token_collator(tokenizer), 0.0, 0
    with evaluating(model) as device:
        for _, rows in by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            logits, labels = model(**batch).logits, batch["labels"]
            for row, target in zip(logits, labels):  # a float32 copy of all may not fit
                total += functional.cross_entropy(
                    row.float(), target, ignore_index=IGNORED, reduction="sum"
                ).item()
            count += int((labels != IGNORED).sum())
    return total / count
