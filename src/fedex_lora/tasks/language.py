"""Causal language modelling: plain text, and instructions with a response."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedex_lora.errors import DataError, RecipeError, shown
from fedex_lora.tasks.base import (
    IGNORED,
    Batch,
    Collate,
    LineOf,
    Task,
    by_length,
    check_columns,
    evaluating,
    one_based,
    pad,
    pad_inputs,
    refuse_first,
)
from fedex_lora.tasks.encoding import bare_responses, encode_pairs, encode_texts, labelled
from fedex_lora.tasks.generation import Decoding, generate, verdicts
from fedex_lora.tasks.metrics import exact_match, mean_loss, perplexity
from fedex_lora.tasks.outputs import Outputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Templates:
    """How a row becomes a prompt and a response, e.g. `"Q: {question} A: "` and `"{answer}"`."""

    prompt: str
    response: str
    columns: tuple[str, ...]


def causal_lm(text_column: str) -> Task:
    """Language modelling of a text column: the loss is over all tokens, cut at `max_length`."""
    return language_task(
        "causal-lm",
        (text_column,),
        primary="perplexity",
        check=partial(_check_text, text_column),
        encode=partial(_encode_text, text_column),
        evaluate=evaluate_loss,
    )


def instruction(prompt: str, response: str, max_new_tokens: int, generate: bool) -> Task:
    """Answering prompts: the loss is over the response and the end-of-text token only.

    Args:
        prompt: Template with `{column}` fields.
        response: Template with at least one such field.
        max_new_tokens: Of a generated answer.
        generate: Whether to generate answers when evaluating, greedily, and count exact matches.

    Raises:
        UserError: A template cannot be read or asks for more than plain column names.
    """
    asked, answered = fields(prompt, "task.prompt"), fields(response, "task.response")
    if not answered:
        raise RecipeError("task.response: no {column} field; every response would be the same.")
    templates = Templates(prompt, response, tuple(dict.fromkeys(asked + answered)))
    return language_task(
        "instruction",
        templates.columns,
        primary="exact_match" if generate else "perplexity",
        check=partial(_check_templates, templates),
        encode=partial(_encode_instructions, templates, generate),
        evaluate=partial(_evaluate_answers, Decoding(max_new_tokens))
        if generate
        else evaluate_loss,
    )


def fields(template: str, where: str) -> tuple[str, ...]:
    """The names of a template's fields.

    Raises:
        UserError: It cannot be read, or a field is no plain name (an attribute, an index, a
            conversion or a format).

    Example:
        >>> fields("Q: {question} {{sic}} A:", "task.prompt")
        ('question',)
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}. {_BRACES}") from error
    names = tuple(name for _, name, _, _ in parsed if name is not None)
    odd = [n for n in names if not n or n.isdecimal() or set(n) & set(".[]{}")]
    if odd or any(spec or conversion for _, _, spec, conversion in parsed):
        shown = f"{{{odd[0]}}}" if odd else "a conversion (!) or a format (:)"
        raise RecipeError(f"{where}: {shown} is not allowed, only plain column names. {_BRACES}")
    return names


_BRACES = "Write fields as {column}, and braces that are meant literally as {{ and }}."


def language_task(name: str, columns: tuple[str, ...], primary: str, **functions: Any) -> Task:
    """A task of a causal language model; `functions` are `check`, `encode` and `evaluate`."""
    return Task(
        name=name,
        auto_model="AutoModelForCausalLM",
        peft_task_type="CAUSAL_LM",
        columns=columns,
        evaluation_splits=("validation", "test"),
        primary=primary,
        higher_is_better=primary != "perplexity",
        collator=_collator,
        **functions,
    )


def _check_text(column: str, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    check_columns(rows, (column,), where, ("text_column",))
    for row, text in enumerate(rows[column]):
        if not isinstance(text, str) or not text.strip():
            found = (
                "missing" if text is None else f"{shown(text)}; expected a text that is not empty"
            )
            raise DataError(f"{where}, line {line_of(row)}: {column} is {found}.")


def _check_templates(
    templates: Templates, rows: Dataset, where: str, line_of: LineOf = one_based
) -> None:
    keys = [
        "prompt" if n in fields(templates.prompt, "") else "response" for n in templates.columns
    ]
    check_columns(rows, templates.columns, where, keys)
    records = _records(rows, templates.columns)
    refuse_first((_problem(templates, row) for row in records), where, line_of)


def _problem(templates: Templates, row: Mapping[str, Any]) -> str | None:
    for name, value in row.items():
        if not isinstance(value, str | int | float):
            found = "missing" if value is None else "neither a text nor a number"
            return f"{name} is {found}."
    if not templates.prompt.format_map(row).strip():
        return "the prompt is empty."
    if not templates.response.format_map(row).strip():
        return "the response is empty."
    return None


def _records(rows: Dataset, columns: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values)) for values in zip(*(rows[name] for name in columns))]


def _encode_text(
    column: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    encoding = encode_texts(rows[column][:], None, tokenizer, max_length)
    encoded = [{"input_ids": ids, "labels": ids} for ids in encoding["input_ids"] if len(ids) > 1]
    return as_dataset(encoded, len(rows), "text has a single token, so that nothing is predicted")


def _encode_instructions(
    templates: Templates,
    generate: bool,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    records = _records(rows, templates.columns)
    asked = [templates.prompt.format_map(row) for row in records]
    answers = bare_responses([templates.response.format_map(row) for row in records], tokenizer)
    pairs = encode_pairs(asked, answers, tokenizer, max_length)
    encoded = [
        labelled(prompt, response, max_length) | ({"response": answer} if generate else {})
        for (prompt, response), answer in zip(pairs, answers)
        if 0 < len(prompt) < max_length
    ]
    return as_dataset(encoded, len(rows), f"prompt alone fills max_length ({max_length} tokens)")


def as_dataset(encoded: list[dict[str, Any]], rows: int, reason: str) -> Dataset:
    """Encoded rows with their `attention_mask`; warns if of `rows` some were left out, and why.

    Raises:
        UserError: None is left.
    """
    dropped = rows - len(encoded)
    if not encoded:
        raise DataError(f"none of the {rows} rows can be used: in each the {reason}.")
    if dropped:
        logger.warning("%d of %d rows left out: their %s", dropped, rows, reason)
    return Dataset.from_list([{**e, "attention_mask": [1] * len(e["input_ids"])} for e in encoded])


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    def collate(rows: list[dict[str, Any]]) -> Batch:
        return {**pad_inputs(rows, tokenizer), "labels": pad(rows, "labels", IGNORED)}

    return collate


def evaluate_loss(
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """`loss`, the mean of −log p over all labels in nats, and `perplexity`, its exponential."""
    sums = row_losses(model, encoded, tokenizer, batch_size)
    loss = mean_loss(*zip(*sums.values()))
    return {"perplexity": perplexity(loss), "loss": loss}


def row_losses(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> dict[int, tuple[float, int]]:
    """By row: the sum of −log p over its labels in nats, and their number."""
    collate = _collator(tokenizer)
    sums: dict[int, tuple[float, int]] = {}
    with evaluating(model) as device:
        for indices, rows in by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            labels = batch.pop("labels")
            sums |= zip(indices, zip(*_nll(model(**batch).logits, labels)))
    return sums


def _nll(logits: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """Per row: the sum of −log p(token | tokens before it) over its labels, and their number.

    Row by row, as a float32 copy of all logits may not fit into memory beside them.
    """
    targets = labels[:, 1:]
    losses = [
        functional.cross_entropy(row.float(), target, reduction="sum", ignore_index=IGNORED).item()
        for row, target in zip(logits[:, :-1], targets)
    ]
    return losses, (targets != IGNORED).sum(dim=1).tolist()


def _evaluate_answers(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    scores = evaluate_loss(model, encoded, tokenizer, batch_size)
    prompts = [prompt_of(dict(row)) for row in encoded]
    answers = generate(model, tokenizer, prompts, decoding, batch_size, outputs)
    references = encoded["response"][:]
    if outputs:
        right = [exact_match([a], [r]) == 1 for a, r in zip(answers, references)]
        more = [{"reference": r, "correct": c} for r, c in zip(references, right)]
        outputs.verdicts(verdicts(tokenizer, prompts, answers, more))
    return {"exact_match": exact_match(answers, references), **scores}


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens of an encoded row that come before its labels."""
    return [i for i, label in zip(row["input_ids"], row["labels"]) if label == IGNORED]
