"""Commonsense reasoning: COMMONSENSE170K and its eight data sets, in the form of LLM-Adapters.

Hu et al., arXiv 2304.01933; section 4 and appendix C of arXiv 2410.09432.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedex_lora.errors import RecipeError, shown
from fedex_lora.recipe import Problem, TaskSpec, did_you_mean, register_task
from fedex_lora.tasks.base import (
    IGNORED,
    LineOf,
    Task,
    check_columns,
    learned_positions,
    one_based,
    refuse_first,
    with_columns,
)
from fedex_lora.tasks.encoding import encode_pairs
from fedex_lora.tasks.generation import Decoding
from fedex_lora.tasks.language import (
    evaluate_loss,
    language_task,
    prompt_of,
)
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, nn
from fedex_lora.tasks.metrics import SHARE, mean_loss, perplexity
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.prompted import (
    Verdict,
    asked,
    check_room,
    evaluate_generated,
    evaluation_rows,
    training_rows,
)
from fedex_lora.tasks.shared import continuation_losses

_BEGIN = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."
PROMPT = f"{_BEGIN}. {_WRITE}\n\n### Instruction:\n{{}}\n\n### Response:\n"
PROMPT_WITH_INPUT = (
    f"{_BEGIN}, paired with an input that provides further context. {_WRITE}\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
"""LLM-Adapters' prompts (Alpaca's), without the 16 spaces that its source indents lines by."""

RESPONSE = "the correct answer is {}"

_ANSWERS = tuple(f"answer{i}" for i in range(1, 6))
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _ANSWERS,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}
"""How a data set names its options; a question of those with `answer1` has some of them."""


COMMONSENSE = tuple(OPTIONS)


class Commonsense(TaskSpec):
    """Choosing among the options that a row's instruction lists.

    Rows have the columns `instruction`, `output` ("the correct answer is X"), `answer` (X) and
    perhaps `input`; whose they are and what their options are shows in `answer` and `instruction`.
    The loss is over `output` and the end-of-text token. There is an evaluation split for each data
    set; of those that are there the mean accuracy is told too.

    Attributes:
        name: The one data set whose rows these are; None for any of the eight.
        generate: Accuracy of greedy answers: the first name of an option in a text, in small
            letters, is the model's choice, as in LLM-Adapters' evaluation.
        score: `likelihood`: accuracy of the likeliest option: the largest log p(RESPONSE of X |
            prompt), summed over its tokens. It is not divided by length: within a row these texts
            differ in the last word alone. The end-of-text token is not scored. Of equally likely
            options it is the first.
    """

    scored: ClassVar[Mapping[str, Any]] = {"generate": True}

    name: str | None = None
    max_new_tokens: int = Field(default=64, ge=1, le=10**7)  # of a generated answer
    generate: bool = False
    score: Literal["generation", "likelihood"] = "generation"

    def renamable(self) -> Sequence[str]:
        return "instruction", "input", "output", "answer"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.name is not None and self.name not in COMMONSENSE:
            near = did_you_mean(self.name, COMMONSENSE)
            yield "name", f"expected one of {_names(COMMONSENSE)}{near}"
        if self.score == "likelihood" and self.generate:
            yield "generate", "with `score: likelihood` nothing is generated; leave it out"

    def build(self, labels: Sequence[str] | None) -> Task:
        likelihood = self.score == "likelihood"
        evaluate = evaluate_loss
        if likelihood:
            evaluate = _evaluate_likelihood
        elif self.generate:
            evaluate = partial(_evaluate_generated, Decoding(self.max_new_tokens))
        task = language_task(
            f"commonsense/{self.name}" if self.name else "commonsense",
            ("instruction", "output", "answer"),
            {"accuracy": SHARE} if self.generate or likelihood else {},
            check=partial(_check, self.name),
            encode=_encode,
            encode_evaluation=_encode_evaluation,
            evaluate=evaluate,
            check_room=partial(check_room, self.max_new_tokens) if self.generate else None,
            decoding=Decoding(self.max_new_tokens),
            blank=partial(_blank, self.name),
        )
        sets = (self.name,) if self.name else COMMONSENSE
        return replace(task, evaluation_splits=("validation", "test", *sets), average_over=sets)


register_task("commonsense", Commonsense)


def options(instruction: str, answer: str) -> tuple[str, ...]:
    """The options of a row: those of the answer's kind that its instruction names.

    Example:
        >>> text = "Which floats? Answer1: iron Answer2: wood Answer format: answer1/answer2"
        >>> options(text, "answer2"), options(text, "answer3"), options(text, "wood")
        (('answer1', 'answer2'), ('answer1', 'answer2'), ())
    """
    lower = instruction.lower()
    return tuple(option for option in _kind(answer) if option in lower)


def choice(answer: str, output: str) -> str | None:
    """The first option in an output, of the same kind as the answer; None if it names none.

    Example:
        >>> choice("answer2", "the correct answer is Answer3, not answer2"), choice("true", "Yes")
        ('answer3', None)
    """
    found = re.search("|".join(_kind(answer)), output.lower())
    return found.group() if found else None


def _kind(answer: str) -> tuple[str, ...]:
    return next((names for names in OPTIONS.values() if answer in names), ())


def _check(name: str | None, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    check_columns(rows, ("instruction", "output", "answer"), where)
    known = OPTIONS[name] if name else tuple(dict.fromkeys(sum(OPTIONS.values(), ())))
    refuse_first((_problem(known, row) for row in map(dict, rows)), where, line_of)


def _blank(name: str | None, rows: Dataset, where: str) -> Dataset:
    """The rows with an answer: one of the options that the instruction names."""
    check_columns(rows, ("instruction",), where)
    kinds = [OPTIONS[name]] if name else list(OPTIONS.values())
    answers = [_any_option(kinds, text) for text in rows["instruction"]]
    return with_columns(rows, {"answer": answers, "output": ["-"] * len(rows)})


def _any_option(kinds: Sequence[tuple[str, ...]], instruction: Any) -> str:
    there = (o for kind in kinds for o in kind if o in str(instruction).lower())
    return next(there, kinds[0][0])


def _problem(known: Sequence[str], row: Mapping[str, Any]) -> str | None:
    for column in ("instruction", "output", "answer"):
        if not isinstance(row[column], str) or not row[column].strip():
            return f"{column} is {shown(row[column])}; expected a text."
    found = f"answer is {shown(row['answer'])}"
    if row["answer"] not in known:
        return f"{found}; expected one of {_names(known)}."
    if row["answer"] not in (there := options(row["instruction"], row["answer"])):
        return f"{found}, but the instruction names only the options {_names(there) or '(none)'}."
    return None


def _names(options: Sequence[str]) -> str:
    return ", ".join(options)


def prompt(row: Mapping[str, Any]) -> str:
    """The prompt for a row, with its `input` if there is any."""
    if row.get("input"):
        return PROMPT_WITH_INPUT.format(row["instruction"], row["input"])
    return PROMPT.format(row["instruction"])


def _encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    prompts, responses = [prompt(row) for row in rows.to_list()], rows["output"][:]
    return training_rows(prompts, responses, tokenizer, max_length)


def _encode_evaluation(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    records = rows.to_list()
    more = [{"answer": r["answer"], "options": _options(r)} for r in records]
    prompts, responses = [prompt(row) for row in records], rows["output"][:]
    return evaluation_rows(prompts, responses, more, tokenizer, max_length)


def _options(row: Mapping[str, Any]) -> list[str]:
    return list(options(row["instruction"], row["answer"]))


def _evaluate_generated(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    return evaluate_generated(_judge, decoding, model, encoded, tokenizer, batch_size, outputs)[0]


def _judge(encoded: Dataset, outputs: Sequence[str]) -> list[Verdict]:
    answers = encoded["answer"][:]
    chosen = [choice(answer, text) for answer, text in zip(answers, outputs)]
    return [Verdict(a, c, a == c) for a, c in zip(answers, chosen)]


def _evaluate_likelihood(
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    rows = [dict(row) for row in encoded]
    groups = [
        [*g, *([row] if asked(row) else [])]
        for g, row in zip(_options_of(model, encoded, tokenizer), rows)
    ]
    found = continuation_losses(model, groups, tokenizer, batch_size)
    # the likeliest option, and the loss of the response that the row has
    scores = [[-loss for loss, _ in losses[:-1]] for losses in found]
    right = [
        bool(s) and row["options"][s.index(max(s))] == row["answer"] for s, row in zip(scores, rows)
    ]
    loss = mean_loss(*zip(*(losses[-1] for losses in found if losses)))
    return {"accuracy": sum(right) / len(right), "perplexity": perplexity(loss), "loss": loss}


def option_scores(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[list[float]]:
    """By row and option: log p(RESPONSE of the option | prompt), summed over its tokens, in nats.

    Args:
        encoded: Rows from the task's `encode_evaluation`; one whose prompt has no room for a
            response has no scores.
    """
    groups = _options_of(model, encoded, tokenizer)
    found = continuation_losses(model, groups, tokenizer, batch_size)
    return [[-loss for loss, _ in losses] for losses in found]


def _check_positions(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    limit, longest = (
        learned_positions(model),
        max((len(row["input_ids"]) for row in rows), default=0),
    )
    if limit is not None and longest > limit:
        raise RecipeError(
            f"task.max_length: a prompt with an option is {longest} tokens long, but the model "
            f"takes at most {limit}; lower task.max_length by {longest - limit} or more"
        )


def _options_of(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[list[dict[str, Any]]]:
    """A row for each option of each row, labelled on its response."""
    texts = {o: RESPONSE.format(o) for row in encoded for o in dict(row)["options"]}
    pairs = encode_pairs([""] * len(texts), list(texts.values()), tokenizer, 1)
    tokens = {option: response[:-1] for option, (_, response) in zip(texts, pairs)}
    groups: list[list[dict[str, Any]]] = []
    for row in map(dict, encoded):
        before = prompt_of(row)
        responses = [tokens[option] for option in row["options"]] if asked(row) else []
        groups.append(
            [
                {"input_ids": before + after, "labels": [IGNORED] * len(before) + after}
                for after in responses
            ]
        )
    _check_positions(model, [row for group in groups for row in group])
    return groups
