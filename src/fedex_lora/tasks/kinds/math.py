"""Mathematical word problems: MetaMathQA, GSM8K and MATH.

Training on MetaMathQA and evaluating on GSM8K and MATH: section 4 of arXiv 2410.09432; Yu et al.,
arXiv 2309.12284. GSM8K: Cobbe et al., arXiv 2110.14168. MATH: Hendrycks et al., arXiv 2103.03874.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeGuard

from pydantic import Field

from fedex_lora.errors import DataError, RecipeError
from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks import answers, latex
from fedex_lora.tasks.arithmetic import answer_of, same
from fedex_lora.tasks.base import LineOf, NoneLeft, Task, check_columns, one_based, with_columns
from fedex_lora.tasks.generation import Decoding
from fedex_lora.tasks.language import evaluate_loss, language_task
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, nn
from fedex_lora.tasks.metrics import SHARE
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.prompted import (
    Verdict,
    accuracy,
    check_room,
    evaluate_generated,
    evaluation_rows,
    training_rows,
)

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
)
"""MetaMath's prompt, for training and evaluation (its train_math.py and eval_gsm8k.py)."""

FORMS: Mapping[str, tuple[str, str]] = {
    "metamath": ("query", "response"),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
}
"""The columns of question and worked solution by which a row's data set is recognised."""

METRICS = dict.fromkeys(("accuracy", *(f"accuracy_{form}" for form in FORMS)), SHARE)

SPLITS = ("validation", "test", "test_gsm8k", "test_math")


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A row: `own` is the answer that it gives beside the solution, if it does."""

    form: str
    question: str
    solution: str
    own: str | None = None

    @property
    def reference(self) -> str | None:
        """The final answer; None if there is none beside the solution and it does not name one."""
        return self.own or answers.final(self.solution)


class Math(TaskSpec):
    """Solving word problems; rows of MetaMathQA, GSM8K and MATH are told apart by their columns.

    The loss is over the worked solution as published, and the end-of-text token. With `generate`
    the metric is accuracy, of greedy answers: `answers.extract` finds the final one, for GSM8K the
    first number in it (`numbers`), as MetaMath's evaluation does (which also rounds it; this does
    not) and lm-evaluation-harness after `####`. So the answer to `#### 2 + 3 = 5` is 2, to
    `#### 1 234` it is 1, and what a model goes on to ask itself after its answer does not count.
    Where a split has rows of several data sets, there is an accuracy of each too, e.g.
    `accuracy_gsm8k`.

    Attributes:
        name: The data set that training rows must be of; None for any. Evaluation rows may be
            of any.
        compare: `latex`: answers are right if math-verify finds them the same in mathematics (see
            `latex.equal_latex`). `string`: if they are spelled the same but for layout, or are the
            same number (see `answers.equal`).
    """

    scored: ClassVar[Mapping[str, Any]] = {"generate": True}

    name: Literal["metamath", "gsm8k", "math"] | None = None
    max_new_tokens: int = Field(default=64, ge=1, le=10**7)  # of a generated solution
    generate: bool = False  # generate solutions when evaluating; else there is the loss alone
    compare: Literal["latex", "string"] = "latex"

    def renamable(self) -> Sequence[str]:
        return "query", "response", "question", "problem", "solution", "answer"

    def build(self, labels: Sequence[str] | None) -> Task:
        answering = partial(_evaluate, Decoding(self.max_new_tokens), self.compare)
        task = language_task(
            f"math/{self.name}" if self.name else "math",
            (),
            METRICS if self.generate else {},
            check=partial(_check, self.generate and self.compare == "latex"),
            encode=partial(_encode, self.name),
            encode_evaluation=partial(_encode_evaluation, self.generate),
            evaluate=answering if self.generate else evaluate_loss,
            check_room=partial(check_room, self.max_new_tokens) if self.generate else None,
            decoding=Decoding(self.max_new_tokens),
            blank=_blank,
        )
        return replace(task, evaluation_splits=SPLITS)


register_task("math", Math)


def problem(row: Mapping[str, Any]) -> Problem | None:
    r"""The problem in a row; None if it has the columns of no data set that is known.

    Example:
        >>> problem({"question": "1 + 1?", "answer": "One and one is two.\n#### 2"}).reference
        '2'
        >>> problem({"problem": "1 + 1?", "solution": r"It is $\boxed{2}$.", "level": 1}).form
        'math'
    """
    for form, (asked, solved) in FORMS.items():
        question, solution = row.get(asked), row.get(solved)
        if _is_text(question) and _is_text(solution):
            own = row.get("answer") if form == "math" else None
            return Problem(form, question, solution, None if own is None else str(own))
    return None


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _check(needs_library: bool, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    if needs_library:  # here, as this is the first that a run does, and exports do not
        latex.require()
    check_columns(rows, (), where)
    if not any(set(columns) <= set(rows.column_names) for columns in FORMS.values()):
        raise DataError(
            f"{where}: there are the columns {', '.join(rows.column_names)}; expected {_EXPECTED}. "
            "Rename them, or name yours: task.columns, e.g. {question: NAME, answer: NAME}."
        )
    for index, row in enumerate(map(dict, rows)):
        if problem(row) is None:
            raise DataError(
                f"{where}, line {line_of(index)}: no problem with a solution, both texts that "
                f"are not empty; expected {_EXPECTED}."
            )


_EXPECTED = "query and response (MetaMathQA), question and answer (GSM8K), or problem and solution \
(MATH)"


def _blank(rows: Dataset, where: str) -> Dataset:
    """The rows with a solution to each problem."""
    check_columns(rows, (), where)
    solutions = [solved for asked, solved in FORMS.values() if asked in rows.column_names]
    return with_columns(rows, {name: ["#### 0"] * len(rows) for name in solutions})


def _problems(rows: Dataset) -> list[Problem]:
    return [found for row in rows.to_list() if (found := problem(row))]


def _encode(
    name: str | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    problems = _problems(rows)
    other = next((p.form for p in problems if name not in (None, p.form)), None)
    if other is not None:
        raise RecipeError(
            f"task.name: {name}, but there are training rows of {other} (by their columns); set "
            f"task.name: {other}, or leave it out to train on any."
        )
    return training_rows(*_texts(problems), tokenizer, max_length)


def _encode_evaluation(
    generate: bool, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    problems = _problems(rows)
    references = [p.reference if generate else "" for p in problems]
    known = [p for p, r in zip(problems, references) if r is not None]
    if not known:
        raise NoneLeft(f"none of the {len(problems)} solutions names its final answer: {_ANSWER}.")
    if len(known) < len(problems):
        count = len(problems) - len(known)
        _log.warning("%d of %d rows left out: no final answer", count, len(problems))
    found = [r for r in references if r is not None]
    more = [{"form": p.form, "reference": r} for p, r in zip(known, found)]
    return evaluation_rows(*_texts(known), more, tokenizer, max_length)


_ANSWER = "expected `The answer is: X`, `#### X`, `\\boxed{X}`, or (MATH) a column answer"


def _texts(problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    return [PROMPT.format(p.question) for p in problems], [p.solution for p in problems]


def _evaluate(
    decoding: Decoding,
    compare: str,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    judge = partial(_judge, compare)
    scores, judged = evaluate_generated(
        judge, decoding, model, encoded, tokenizer, batch_size, outputs
    )
    forms = encoded["form"][:]
    if len(set(forms)) > 1:
        for form in sorted(set(forms)):
            scores[f"accuracy_{form}"] = accuracy([v for f, v in zip(forms, judged) if f == form])
    return scores


def _judge(compare: str, encoded: Dataset, outputs: Sequence[str]) -> list[Verdict]:
    references = encoded["reference"][:]
    found = [answer_of(form, text) for form, text in zip(encoded["form"], outputs)]
    right = same(list(zip(references, found)), compare)
    return [Verdict(*each) for each in zip(references, found, right)]
