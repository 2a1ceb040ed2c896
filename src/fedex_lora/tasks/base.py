"""What a task is: a value that says how rows are checked, encoded, batched and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedex_lora.errors import DataError, UserError, shown
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, Tensor, nn, torch
from fedex_lora.tasks.metrics import Metric
from fedex_lora.tasks.outputs import Outputs

Batch = dict[str, Tensor]
Collate = Callable[[list[dict[str, Any]]], Batch]
LineOf = Callable[[int], int]

IGNORED = -100  # the label PyTorch's and Hugging Face's losses pass over


def one_based(row: int) -> int:
    """The line of a row where every line of the file is a row."""
    return row + 1


_place: ContextVar[Callable[[int], str]] = ContextVar("place")


def place(row: int) -> str:
    """Where a row that is being encoded stands, for messages: its file and line, where known.

    Example:
        >>> with placed(lambda row: f"a.csv, line {row + 2}"), shifted(1):
        ...     place(0)
        'a.csv, line 3'
        >>> place(0)
        'row 1'
    """
    return _place.get(_by_number)(row)


def _by_number(row: int) -> str:
    return f"row {row + 1}"


@contextmanager
def placed(where: Callable[[int], str]) -> Iterator[None]:
    """Runs a block in which this says where rows stand."""
    token = _place.set(where)
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def shifted(start: int) -> Iterator[None]:
    """Runs a block for the rows from `start` on, which count from 0 there."""
    outer = _place.get(_by_number)
    with placed(lambda row: outer(start + row)):
        yield


class Check(Protocol):
    def __call__(self, rows: Dataset, where: str, line_of: LineOf = one_based) -> None: ...


class Encode(Protocol):
    def __call__(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset: ...


class Evaluate(Protocol):
    def __call__(
        self,
        model: nn.Module,
        encoded: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        outputs: Outputs | None = None,
    ) -> dict[str, float]: ...


class Blank(Protocol):
    def __call__(self, rows: Dataset, where: str) -> Dataset: ...


def as_they_are(rows: Dataset, where: str) -> Dataset:
    """The `Blank` of rows that have no answers."""
    return rows


class Tell(Protocol):
    def __call__(
        self,
        model: nn.Module,
        encoded: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> Sequence[dict[str, Any] | None]: ...


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a task answers rows that have no labels.

    Attributes:
        blank: `blank(rows, where)` gives the rows with something in place of every answer, which
            checking and encoding ask for. It raises a `UserError` if a column is missing that
            answers are told from.
        tell: `tell(model, encoded, tokenizer, batch_size, max_new_tokens)` gives of each encoded
            row what is told of it by column, `prediction` among them; None where nothing is.
        encode: Makes the encoded rows; None where they are as for an evaluation.
    """

    tell: Tell
    blank: Blank = as_they_are
    encode: Encode | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task; built by `fedex_lora.tasks.build_task`.

    Attributes:
        name: What it is called in records and model cards, e.g. `glue/sst2`.
        auto_model: The transformers class that loads the model, e.g. `AutoModelForCausalLM`.
        peft_task_type: PEFT's name of it, e.g. `SEQ_CLS`; it has none for images.
        columns: The columns that every row must have.
        evaluation_splits: All splits it can be evaluated on, in order of preference: the first
            that exists selects the best round. Test splits come last.
        primary: The metric that selects the best round.
        metrics: How the numbers that `evaluate` gives are read, by name. It may give others, too:
            those are recorded, and may be any finite numbers.
        labels: The names of the classes in the order of their numbers, if there are classes.
        multi_label: Whether a row may have any number of the classes.
        regression: Whether the label is a number to be predicted.
        stratify: The label column, by which rows can be dealt out unevenly.
        image: The column that holds images, if there is one. Encoded rows have that column, not
            `input_ids`, and there is a processor in place of a tokenizer.
        check: `check(rows, where, line_of)` raises a `UserError` that names `where` and the line
            of the first row that this task cannot use; `line_of` maps a row's index to its line.
        encode: `encode(rows, tokenizer, max_length)` tokenises once, in memory, without padding:
            columns `input_ids`, `attention_mask`, `labels`, and what else scoring needs.
        collator: `collator(tokenizer)` makes batches of encoded rows, padded to the longest: a
            function that can be pickled, as processes that load batches are given it.
        evaluate: `evaluate(model, encoded, tokenizer, batch_size, outputs)` gives named numbers,
            `primary` among them, on the model's device, and leaves the model's training mode as it
            was. Tasks that generate texts keep them in `outputs`, if given; all others ignore it.
        encode_evaluation: The same for rows to be evaluated on; None where `encode` does that.
        check_room: `check_room(model, parts)` raises a `UserError` if there is no room in the
            model for what is generated after the prompts of encoded rows; None where nothing is.
        check_training: `check_training(model, rows)` raises a `UserError` if the model cannot be
            trained on batches of the encoded rows as they are; None where all can.
        average_over: Splits whose mean score is told too, where there are several of them.
        chat_template: The Jinja text that exported tokenizers get; None for the one they have.
        renamed: What the rows call a column, where they do not call it as the task does.
        prediction: How rows without labels are answered; None where they cannot be.
    """

    name: str
    auto_model: str
    peft_task_type: str | None
    columns: tuple[str, ...]
    evaluation_splits: tuple[str, ...]
    primary: str
    metrics: Mapping[str, Metric]
    check: Check
    encode: Encode
    collator: Callable[[PreTrainedTokenizerBase], Collate]
    evaluate: Evaluate
    labels: tuple[str, ...] | None = None
    multi_label: bool = False
    regression: bool = False
    stratify: str | None = None
    image: str | None = None
    encode_evaluation: Encode | None = None
    check_room: Callable[[nn.Module, Sequence[Dataset]], None] | None = None
    check_training: Callable[[nn.Module, Dataset], None] | None = None
    average_over: tuple[str, ...] = ()
    chat_template: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        for part in ("check", "encode", "collator", "evaluate"):
            if not callable(getattr(self, part)):
                got = shown(getattr(self, part))
                raise UserError(f"task {self.name!r}: {part} is {got}; expected a function")
        read = self.metrics.get(self.primary) if isinstance(self.metrics, Mapping) else None
        if not isinstance(read, Metric):
            raise UserError(
                f"task {self.name!r}: metrics lacks its primary one; expected "
                f"{{{self.primary!r}: Metric(higher_is_better=..., range=...)}}"
            )

    @property
    def higher_is_better(self) -> bool:
        """Whether `primary` is to grow."""
        return self.metrics[self.primary].higher_is_better

    @property
    def processor(self) -> str:
        """The transformers class that loads the tokenizer, or what is in its place: the image
        processor, or both in one."""
        if self.image is None:
            return "AutoTokenizer"
        both = self.auto_model == "AutoModelForImageTextToText"
        return "AutoProcessor" if both else "AutoImageProcessor"

    @property
    def fusable(self) -> bool:
        """Whether clients' losses can be told apart in a batch of several clients' rows."""
        known = ("CausalLM", "SequenceClassification", "ImageClassification")
        return not self.multi_label and self.auto_model.removeprefix("AutoModelFor") in known

    def model_kwargs(self) -> dict[str, Any]:
        """What the task asks of the model's config (arguments of `from_pretrained`)."""
        if self.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        if self.labels is None:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": f"{'multi' if self.multi_label else 'single'}_label_classification",
        }

    def average(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """`average`: the mean of `primary` over those of `average_over` that have scores.

        Args:
            scores: By split.

        Returns:
            Nothing where fewer than two of these splits have scores.
        """
        found = [scores[name][self.primary] for name in self.average_over if name in scores]
        return {"average": {self.primary: sum(found) / len(found)}} if len(found) > 1 else {}


_POSITIONS = ("position_embeddings", "wpe", "embed_positions")  # learned, in BERT, GPT-2, OPT


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a model has learned positions for; None if positions are computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa's positions begin after its padding index
            return module.num_embeddings - (module.padding_idx or -1) - 1
    return None


def check_columns(
    rows: Dataset, columns: Sequence[str], where: str, keys: Sequence[str] = ()
) -> None:
    """Raise a `UserError` if there are no rows or a column is missing.

    Args:
        keys: Of the recipe's task block, by which each column is named; `columns.NAME` if none.
    """
    keys = keys or [f"columns.{name}" for name in columns]
    for name, key in zip(columns, keys, strict=True):
        if name not in rows.column_names:
            raise DataError(
                f"{where}: no column '{name}'; there are: {', '.join(rows.column_names)}. Rename "
                f"the column, or name the right one with task.{key}."
            )
    if len(rows) == 0:
        raise DataError(f"{where}: no rows; at least one is needed.")


def blanked(
    rows: Dataset,
    where: str,
    columns: Sequence[str],
    answers: Mapping[str, Any],
    keys: Sequence[str] = (),
) -> Dataset:
    """The rows with the same for each answer, whatever they had there.

    Args:
        columns: What answers are told from; with `keys`, as `check_columns` takes them.
        answers: By column.

    Raises:
        UserError: There are no rows, or a column is missing.
    """
    check_columns(rows, columns, where, keys)
    return with_columns(rows, {name: [value] * len(rows) for name, value in answers.items()})


def with_columns(rows: Dataset, columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """The rows with these columns, in place of those that were called so."""
    kept = [name for name in rows.column_names if name not in columns]
    if not kept:
        return Dataset.from_dict(dict(columns))
    rows = rows.select_columns(kept)
    for name, values in columns.items():
        rows = rows.add_column(name, list(values))  # type: ignore[call-arg]
    return rows


class NoneLeft(DataError):
    """A task makes nothing of any of the rows: each is too long, or has nothing to learn."""


def refuse_first(problems: Iterable[str | None], where: str, line_of: LineOf) -> None:
    """Raise a `UserError` for the first row that has a problem.

    Lines are asked for then only: each takes a pass over the file.
    """
    for row, problem in enumerate(problems):
        if problem is not None:
            raise DataError(f"{where}, line {line_of(row)}: {problem}")


def pad(rows: Sequence[Mapping[str, Any]], key: str, value: int, side: str = "right") -> Tensor:
    """The rows' lists under `key` as one int64 tensor (rows × longest), filled up with `value`."""
    tensors = [torch.tensor(row[key], dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side=side
    )


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up rows: of a tokenizer without one any, as it is masked everywhere."""
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(number for number in known if isinstance(number, int))


def pad_inputs(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The model's inputs for encoded rows, padded on the right to the longest row."""
    fill = {
        "input_ids": padding(tokenizer),
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    return {key: pad(rows, key, value) for key, value in fill.items() if key in rows[0]}


def unasked(row: Mapping[str, Any]) -> bool:
    """Whether an encoded row is a prompt that has no room for a response.

    Example:
        >>> unasked({"labels": [IGNORED, IGNORED]}), unasked({"labels": [IGNORED, 7]})
        (True, False)
        >>> unasked({"labels": 1})  # a class
        False
    """
    return isinstance(row["labels"], list) and row["labels"][-1] == IGNORED


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards every module has the mode it had.

    Yields:
        The device of the model's parameters.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode


def by_length(encoded: Dataset, batch_size: int) -> Iterator[tuple[list[int], list[dict]]]:
    """Batches of rows of about equal length, longest first, with the rows' indices; images, which
    have no lengths, in their order."""
    texts = "input_ids" in encoded.column_names
    lengths = [len(ids) for ids in encoded["input_ids"]] if texts else [0] * len(encoded)
    for indices in longest_first(lengths, batch_size):
        yield indices, [encoded[i] for i in indices]


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices, longest first, so that a batch size that needs too much memory fails
    at once.

    Example:
        >>> list(longest_first([2, 9, 2, 5], 3))
        [[1, 3, 0], [2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
