"""Causal language modelling: plain text, and instructions with a response."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any, cast

from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedex_lora.errors import UserError
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
    with_padding,
)
from fedex_lora.tasks.metrics import exact_match, mean_loss, perplexity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Templates:
    """How a row becomes a prompt and a response, e.g. `"Q: {question} A: "` and `"{answer}"`."""

    prompt: str
    response: str
    columns: tuple[str, ...]


def causal_lm(text_column: str) -> Task:
    """Language modelling of a text column: the loss is over all tokens, cut at `max_length`."""
    return _task(
        "causal-lm",
        (text_column,),
        primary="perplexity",
        check=partial(_check_text, text_column),
        encode=partial(_encode_text, text_column),
        evaluate=_evaluate,
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
        raise UserError("task.response: no {column} field; every response would be the same.")
    templates = Templates(prompt, response, tuple(dict.fromkeys(asked + answered)))
    return _task(
        "instruction",
        templates.columns,
        primary="exact_match" if generate else "perplexity",
        check=partial(_check_templates, templates),
        encode=partial(_encode_instructions, templates, generate),
        evaluate=partial(_evaluate_answers, max_new_tokens) if generate else _evaluate,
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
        raise UserError(f"{where}: {error}. {_BRACES}") from error
    names = tuple(name for _, name, _, _ in parsed if name is not None)
    odd = [n for n in names if not n or n.isdecimal() or set(n) & set(".[]{}")]
    if odd or any(spec or conversion for _, _, spec, conversion in parsed):
        shown = f"{{{odd[0]}}}" if odd else "a conversion (!) or a format (:)"
        raise UserError(f"{where}: {shown} is not allowed, only plain column names. {_BRACES}")
    return names


_BRACES = "Write fields as {column}, and braces that are meant literally as {{ and }}."


def _task(name: str, columns: tuple[str, ...], primary: str, **functions: Any) -> Task:
    return Task(
        name=name,
        auto_model="AutoModelForCausalLM",
        peft_task_type="CAUSAL_LM",
        columns=columns,
        evaluation_splits=("validation", "test"),
        primary=primary,
        higher_is_better=primary == "exact_match",
        collator=_collator,
        **functions,
    )


def _check_text(column: str, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    check_columns(rows, (column,), where)
    for row, text in enumerate(rows[column]):
        if not isinstance(text, str) or not text.strip():
            found = "missing" if text is None else f"{text!r}; expected a text that is not empty"
            raise UserError(f"{where}, line {line_of(row)}: {column} is {found}.")


def _check_templates(
    templates: Templates, rows: Dataset, where: str, line_of: LineOf = one_based
) -> None:
    check_columns(rows, templates.columns, where)
    for index, row in enumerate(_records(rows, templates.columns)):
        at = f"{where}, line {line_of(index)}"
        for name, value in row.items():
            if not isinstance(value, str | int | float):
                found = "missing" if value is None else "neither a text nor a number"
                raise UserError(f"{at}: {name} is {found}.")
        if not templates.prompt.format_map(row).strip():
            raise UserError(f"{at}: the prompt is empty.")
        if not templates.response.format_map(row).strip():
            raise UserError(f"{at}: the response is empty.")


def _records(rows: Dataset, columns: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values)) for values in zip(*(rows[name] for name in columns))]


def _encode_text(
    column: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    encoding = tokenizer(rows[column][:], truncation=True, max_length=max_length)
    encoded = [{"input_ids": ids, "labels": ids} for ids in encoding["input_ids"] if len(ids) > 1]
    return _dataset(encoded, len(rows), "text has a single token, so that nothing is predicted")


def _encode_instructions(
    templates: Templates,
    generate: bool,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    records = _records(rows, templates.columns)
    answers = [templates.response.format_map(row) for row in records]
    prompts = _prompt_ids([templates.prompt.format_map(row) for row in records], tokenizer)
    responses = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    end = _end_of_text(tokenizer)
    encoded = [
        _instruction(prompt, [*response, end], max_length) | ({"response": a} if generate else {})
        for prompt, response, a in zip(prompts, responses, answers)
        if 0 < len(prompt) < max_length
    ]
    return _dataset(encoded, len(rows), f"prompt alone fills max_length ({max_length} tokens)")


def _instruction(prompt: list[int], response: list[int], max_length: int) -> dict[str, Any]:
    ids = [*prompt, *response][:max_length]
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


def _prompt_ids(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Without the end-of-text token some tokenizers append: the response is still to come."""
    encoded = tokenizer(prompts, verbose=False)["input_ids"]  # what is too long is cut or left out
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token, which task "
            "kind instruction needs to end a response; add an eos_token to its configuration."
        )
    return cast(int, tokenizer.eos_token_id)


def _dataset(encoded: list[dict[str, Any]], rows: int, reason: str) -> Dataset:
    dropped = rows - len(encoded)
    if not encoded:
        raise UserError(f"none of the {rows} rows can be used: in each the {reason}.")
    if dropped:
        logger.warning("%d of %d rows left out: their %s", dropped, rows, reason)
    return Dataset.from_list([{**e, "attention_mask": [1] * len(e["input_ids"])} for e in encoded])


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    def collate(rows: list[dict[str, Any]]) -> Batch:
        return {**pad_inputs(rows, tokenizer), "labels": pad(rows, "labels", IGNORED)}

    return collate


def _evaluate(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> dict[str, float]:
    collate = _collator(tokenizer)
    sums: list[tuple[float, int]] = []
    with evaluating(model) as device:
        for _, rows in by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            labels = batch.pop("labels")
            sums += zip(*_nll(model(**batch).logits, labels))
    loss = mean_loss(*zip(*sums))
    return {"perplexity": perplexity(loss), "loss": loss}


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
    max_new_tokens: int,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> dict[str, float]:
    scores = _evaluate(model, encoded, tokenizer, batch_size)
    answers = _answers(max_new_tokens, model, encoded, tokenizer, batch_size)
    return {"exact_match": exact_match(answers, encoded["response"][:]), **scores}


def _answers(
    max_new_tokens: int,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[str]:
    """The greedy answers to the prompts, in the order of the rows."""
    settings = _greedy(max_new_tokens, with_padding(tokenizer))
    prompts = Dataset.from_list([{"input_ids": _prompt(dict(row))} for row in encoded])
    answers: dict[int, str] = {}
    with evaluating(model) as device:
        for indices, rows in by_length(prompts, batch_size):
            batch = {k: v.to(device) for k, v in _left_padded(rows, tokenizer).items()}
            generated = cast(Any, model).generate(**batch, generation_config=settings)
            new = generated[:, batch["input_ids"].shape[1] :]
            answers |= zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True))
    return [answers[i] for i in range(len(answers))]


def _prompt(row: Mapping[str, Any]) -> list[int]:
    return [i for i, label in zip(row["input_ids"], row["labels"]) if label == IGNORED]


def _left_padded(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Padded on the left, so that every prompt ends where its answer begins."""
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        "input_ids": pad(rows, "input_ids", cast(int, tokenizer.pad_token_id), side="left"),
        "attention_mask": pad(masked, "attention_mask", 0, side="left"),
    }


def _greedy(max_new_tokens: int, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # named, as the model's own settings would fill in what is not
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
