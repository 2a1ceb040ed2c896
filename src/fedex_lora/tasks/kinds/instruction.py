"""Answering prompts: the loss is over the response and the end-of-text token only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

from pydantic import Field

from fedex_lora.errors import RecipeError
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks import rouge
from fedex_lora.tasks.base import LineOf, Task, blanked, check_columns, one_based, refuse_first
from fedex_lora.tasks.encoding import bare_responses, encode_pairs, labelled
from fedex_lora.tasks.generation import Decoding, generate, matched
from fedex_lora.tasks.language import as_dataset, evaluate_loss, language_task, prompt_of
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, nn
from fedex_lora.tasks.metrics import SHARE
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.prompted import check_room


class Instruction(TaskSpec):
    prompt: str  # template with {column} fields
    response: str  # template with at least one such field
    max_new_tokens: int = Field(default=64, ge=1, le=10**7)
    generate: bool = False  # generate answers when evaluating, greedily, and count exact matches
    rouge: bool = False  # ROUGE of these too, of which rougeL selects the best round
    packing: bool = False  # training batches without padding: rows in one sequence

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from rouge.problems(self.rouge, self.generate)

    def build(self, labels: Sequence[str] | None) -> Task:
        templates = templates_of(self.prompt, self.response)
        answers = partial(_evaluate_answers, Decoding(self.max_new_tokens), self.rouge)
        exact = {"exact_match": SHARE} if self.generate else {}
        return language_task(
            "instruction",
            templates.columns,
            {**rouge.asked(self.rouge), **exact},
            check=partial(check_templates, templates),
            encode=partial(_encode, templates, self.generate),
            evaluate=answers if self.generate else evaluate_loss,
            check_room=partial(check_room, self.max_new_tokens) if self.generate else None,
            packing=self.packing,
            decoding=Decoding(self.max_new_tokens),
            blank=partial(blank_templates, templates),
        )


register_task("instruction", Instruction)


@dataclass(frozen=True)
class Templates:
    """How a row becomes a prompt and a response, e.g. `"Q: {question} A: "` and `"{answer}"`."""

    prompt: str
    response: str
    columns: tuple[str, ...]


def templates_of(prompt: str, response: str) -> Templates:
    """The templates of a task's block.

    Raises:
        UserError: One cannot be read or asks for more than plain column names.
    """
    asked, answered = fields(prompt, "task.prompt"), fields(response, "task.response")
    if not answered:
        raise RecipeError("task.response: no {column} field; every response would be the same.")
    return Templates(prompt, response, tuple(dict.fromkeys(asked + answered)))


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


def check_templates(
    templates: Templates, rows: Dataset, where: str, line_of: LineOf = one_based
) -> None:
    """Raise a `UserError` that names the line of the first row that gives no prompt or response."""
    keys = [
        "prompt" if n in fields(templates.prompt, "") else "response" for n in templates.columns
    ]
    check_columns(rows, templates.columns, where, keys)
    found = records(rows, templates.columns)
    refuse_first((_problem(templates, row) for row in found), where, line_of)


def blank_templates(templates: Templates, rows: Dataset, where: str) -> Dataset:
    """The rows with something for what only the response names."""
    asked = fields(templates.prompt, "")
    answers = dict.fromkeys(name for name in templates.columns if name not in asked)
    keys = ["prompt"] * len(asked)
    return blanked(rows, where, asked, dict.fromkeys(answers, "-"), keys)


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


def records(rows: Dataset, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows' values of these columns."""
    return (dict(zip(columns, values)) for values in zip(*(rows[name] for name in columns)))


def _encode(
    templates: Templates,
    generate: bool,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    found = list(records(rows, templates.columns))
    asked = [templates.prompt.format_map(row) for row in found]
    answers = bare_responses([templates.response.format_map(row) for row in found], tokenizer)
    pairs = encode_pairs(asked, answers, tokenizer, max_length)
    encoded = [
        labelled(prompt, response, max_length) | ({"response": answer} if generate else {})
        for (prompt, response), answer in zip(pairs, answers)
        if 0 < len(prompt) < max_length
    ]
    return as_dataset(encoded, len(rows), f"prompt alone fills max_length ({max_length} tokens)")


def _evaluate_answers(
    decoding: Decoding,
    with_rouge: bool,
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
    share = matched(tokenizer, prompts, answers, references, outputs)
    more_scores = rouge.rouge(answers, references) if with_rouge else {}
    return {**more_scores, "exact_match": share, **scores}
