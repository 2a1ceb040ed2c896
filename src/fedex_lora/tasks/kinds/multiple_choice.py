"""Multiple choice: which of a question's answers is the right one, told by an encoder.

The answers are a list in one column, or stand in columns of their own. All rows of a file have
equally many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedex_lora.errors import shown
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import (
    Batch,
    Collate,
    LineOf,
    Prediction,
    Task,
    blanked,
    check_columns,
    one_based,
    pad_inputs,
    refuse_first,
    with_columns,
)
from fedex_lora.tasks.classification import told
from fedex_lora.tasks.encoding import encode_texts
from fedex_lora.tasks.lazy import (
    Dataset,
    PreTrainedTokenizerBase,
    functional,
    torch,
)
from fedex_lora.tasks.logits import Logits, evaluate_logits, tell_logits
from fedex_lora.tasks.metrics import LOSS, SHARE


class MultipleChoice(TaskSpec):
    vocabulary = False

    question_column: str = "question"
    choices_column: str = "choices"
    choice_columns: list[str] | None = None  # in place of the list in choices_column
    label_column: str = "label"  # the number of the right choice from 0 on, its letter or its text

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.choice_columns is not None and len(set(self.choice_columns)) < max(
            2, len(self.choice_columns)
        ):
            yield "choice_columns", "expected two or more columns, all different"

    @property
    def choices(self) -> list[str]:
        """The columns that the choices are in."""
        return self.choice_columns or [self.choices_column]

    def build(self, labels: Sequence[str] | None) -> Task:
        return Task(
            name="multiple-choice",
            auto_model="AutoModelForMultipleChoice",
            peft_task_type=None,
            columns=(self.question_column, *self.choices, self.label_column),
            evaluation_splits=("validation", "test"),
            primary="accuracy",
            metrics={"accuracy": SHARE, "loss": LOSS},
            check=partial(_check, self),
            encode=partial(_encode, self),
            collator=_collator,
            evaluate=partial(evaluate_logits, _collator, _scores),
            stratify=self.label_column,
            prediction=Prediction(
                blank=self._blank,
                encode=partial(_encode_choices, self),
                tell=partial(tell_logits, _collator, _told),
            ),
        )

    def _blank(self, rows: Dataset, where: str) -> Dataset:
        columns = (self.question_column, *self.choices)
        keys = ("question_column", *(self.choice_columns or ["choices_column"]))
        return blanked(rows, where, columns, {self.label_column: 0}, keys)


register_task("multiple-choice", MultipleChoice)


def _check(spec: MultipleChoice, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    choices = spec.choices if spec.choice_columns else ["choices_column"]
    keys = ("question_column", *choices, "label_column")
    columns = (spec.question_column, *spec.choices, spec.label_column)
    check_columns(rows, columns, where, keys)
    first = next(_records(spec, rows))[1]
    most = len(first) if isinstance(first, list) else 0
    refuse_first((_problem(spec, row, most) for row in _records(spec, rows)), where, line_of)


Record = tuple[Any, Any, Any]  # question, choices, label


def _records(spec: MultipleChoice, rows: Dataset) -> Iterator[Record]:
    lists = (
        zip(*(rows[name] for name in spec.choice_columns))
        if spec.choice_columns
        else rows[spec.choices_column]
    )
    for question, choices, label in zip(
        rows[spec.question_column], lists, rows[spec.label_column], strict=True
    ):
        if isinstance(choices, Mapping):  # as ARC has it: {"text": [...], "label": [...]}
            choices, label = choices.get("text"), _by_letter(choices.get("label"), label)
        yield question, list(choices) if isinstance(choices, tuple) else choices, label


def _by_letter(letters: Any, label: Any) -> Any:
    """The place of a row's own name for its right choice."""
    return letters.index(label) if isinstance(letters, list) and label in letters else label


def _problem(spec: MultipleChoice, row: Record, count: int) -> str | None:
    question, choices, label = row
    if not isinstance(question, str) or not question.strip():
        return f"{spec.question_column} is {shown(question)}; expected a text that is not empty."
    if not isinstance(choices, list) or len(choices) < 2:
        return f"the choices are {shown(choices)}; expected a list of two or more."
    odd = next((c for c in choices if not isinstance(c, str) or not c.strip()), "")
    if odd != "" or not all(choices):
        return f"a choice is {shown(odd)}; expected a text that is not empty."
    if len(choices) != count:
        return f"{len(choices)} choices, where the first row has {count}; expected as many."
    if _place(choices, label) is None:
        return (
            f"{spec.label_column} is {shown(label)}; expected a number from 0 to {count - 1}, a "
            "letter from A on, or the text of a choice."
        )
    return None


def _place(choices: Sequence[str], label: Any) -> int | None:
    """Which choice a label means; its text goes before what it may be as a number or a letter."""
    if isinstance(label, str) and list(choices).count(label) == 1:
        return choices.index(label)
    text = str(label).strip()
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    if len(text) == 1 and text.isalpha() and text.isascii():
        number = ord(text.upper()) - ord("A")
    elif text.removesuffix(".0").isdecimal():
        number = int(text.removesuffix(".0"))
    else:
        return None
    return number if 0 <= number < len(choices) else None


def _encode(
    spec: MultipleChoice, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Every row has a list of sequences: the question with each of its choices."""
    records = list(_records(spec, rows))
    count = len(records[0][1])
    questions = [question for question, choices, _ in records for _ in choices]
    choices = [choice for _, choices, _ in records for choice in choices]
    flat = encode_texts(questions, choices, tokenizer, max_length)
    grouped = {
        name: [values[i : i + count] for i in range(0, len(values), count)]
        for name, values in flat.items()
    }
    labels = [_place(choices, label) for _, choices, label in records]
    return Dataset.from_dict({**grouped, "labels": labels})


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Inputs of rows × choices × tokens."""
    return partial(_batch, tokenizer)


def _batch(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Batch:
    keys = [key for key in rows[0] if key != "labels"]
    each = [
        {key: row[key][i] for key in keys} for row in rows for i in range(len(row["input_ids"]))
    ]
    flat = pad_inputs(each, tokenizer)
    batch = {key: value.reshape(len(rows), -1, value.shape[1]) for key, value in flat.items()}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def _scores(rows: Logits, encoded: Dataset) -> dict[str, float]:
    logits, labels = torch.stack([*rows]), torch.tensor(encoded["labels"][:])
    right = (logits.argmax(dim=1) == labels).double().mean().item()
    return {"accuracy": right, "loss": functional.cross_entropy(logits, labels).item()}


def _encode_choices(
    spec: MultipleChoice, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """The encoded rows with the texts of their choices."""
    texts = [choices for _, choices, _ in _records(spec, rows)]
    return with_columns(_encode(spec, rows, tokenizer, max_length), {"texts": texts})


def _told(logits: Logits, encoded: Dataset) -> list[dict[str, Any]]:
    """The likeliest choice, and its probability."""
    texts = encoded["texts"][:]
    return [told(mine, [row])[0] for mine, row in zip(texts, logits, strict=True)]
