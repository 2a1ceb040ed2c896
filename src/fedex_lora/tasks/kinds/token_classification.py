"""Finding entities in texts (named entity recognition): each token is outside of all, or begins or
continues an entity of one of the agreed classes (BIO).

A row has a list of words and a list of their tags, or a text and a list of entities with `start`,
`end` and `label`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedex_lora.errors import RecipeError, check_installed, shown
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import (
    IGNORED,
    LineOf,
    Prediction,
    Task,
    blanked,
    check_columns,
    one_based,
    place,
    refuse_first,
    with_columns,
)
from fedex_lora.tasks.encoding import shortened, token_collator
from fedex_lora.tasks.entities import (
    Annotated,
    Unusable,
    of_spans,
    of_words,
    on_tokens,
    sequences,
    tags_of,
    told,
)
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, datasets, functional, torch
from fedex_lora.tasks.logits import Logits, evaluate_logits, tell_logits
from fedex_lora.tasks.metrics import LOSS, SHARE

METRICS = dict.fromkeys(("f1", "precision", "recall", "accuracy"), SHARE) | {"loss": LOSS}

_log = logging.getLogger(__name__)


class TokenClassification(TaskSpec):
    vocabulary = False
    forms = (("tokens_column", "tags_column"), ("text_column", "entities_column"))

    labels: list[str]  # the classes of entities, in the order that all clients agree on
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    text_column: str = "text"  # with entities_column, where there are no words
    entities_column: str = "entities"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.labels or len(set(self.labels)) < len(self.labels):
            yield "labels", "expected one or more classes of entities, all different"
        if odd := [name for name in self.labels if name[:2] in ("B-", "I-") or name == "O"]:
            yield "labels", f"{odd[0]!r}: expected the classes alone, without O, B- and I-"

    def build(self, labels: Sequence[str] | None) -> Task:
        check_installed("seqeval", "task.kind: token-classification")
        tags = tags_of(self.labels)
        return Task(
            name="token-classification",
            auto_model="AutoModelForTokenClassification",
            peft_task_type="TOKEN_CLS",
            columns=(),
            evaluation_splits=("validation", "test"),
            primary="f1",
            metrics=METRICS,
            check=partial(_check, self, tags),
            encode=partial(_encode, self, tags),
            collator=token_collator,
            evaluate=partial(evaluate_logits, token_collator, partial(_scores, tags)),
            labels=tags,
            prediction=Prediction(
                blank=partial(_blank, self),
                encode=partial(_encode, self, tags, placed=True),
                tell=partial(tell_logits, token_collator, partial(_told, tags)),
            ),
        )


register_task("token-classification", TokenClassification)


def _columns(spec: TokenClassification, rows: Dataset) -> tuple[str, str]:
    spans = spec.tokens_column not in rows.column_names and spec.text_column in rows.column_names
    return (
        (spec.text_column, spec.entities_column)
        if spans
        else (spec.tokens_column, spec.tags_column)
    )


def _check(
    spec: TokenClassification,
    tags: tuple[str, ...],
    rows: Dataset,
    where: str,
    line_of: LineOf = one_based,
) -> None:
    columns = _columns(spec, rows)
    spans = columns[0] == spec.text_column
    keys = ("text_column", "entities_column") if spans else ("tokens_column", "tags_column")
    check_columns(rows, columns, where, keys)
    refuse_first(map(partial(_problem, spec, tags), _records(spec, rows)), where, line_of)


def _blank(spec: TokenClassification, rows: Dataset, where: str) -> Dataset:
    """The rows without entities."""
    if _columns(spec, rows)[0] == spec.text_column:
        return blanked(rows, where, [spec.text_column], {spec.entities_column: []}, ["text_column"])
    check_columns(rows, [spec.tokens_column], where, ["tokens_column"])
    tags = [["O"] * len(words or []) for words in rows[spec.tokens_column]]
    return with_columns(rows, {spec.tags_column: tags})


def _problem(
    spec: TokenClassification, tags: tuple[str, ...], row: Mapping[str, Any]
) -> str | None:
    try:
        _annotated(spec, tags, row)
    except Unusable as problem:
        return str(problem)
    return None


def _records(spec: TokenClassification, rows: Dataset) -> Iterator[dict[str, Any]]:
    columns = _columns(spec, rows)
    names = _names(rows, columns[1])
    for values in zip(*(rows[name] for name in columns)):
        row = dict(zip(columns, values))
        if names and isinstance(row[columns[1]], list):
            row[columns[1]] = [names[i] for i in row[columns[1]]]
        yield row


def _names(rows: Dataset, column: str) -> list[str] | None:
    """The data's own names of tags that are numbers."""
    feature = getattr(rows.features[column], "feature", None)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _annotated(
    spec: TokenClassification, tags: tuple[str, ...], row: Mapping[str, Any]
) -> Annotated:
    if spec.tokens_column in row:
        return of_words(row[spec.tokens_column], row[spec.tags_column], tags)
    return of_spans(row[spec.text_column], row[spec.entities_column], spec.labels)


def _encode(
    spec: TokenClassification,
    tags: tuple[str, ...],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    placed: bool = False,
) -> Dataset:
    """The rows as tokens; `placed` says of each where it stands in the text, too."""
    if not tokenizer.is_fast:
        raise RecipeError(
            "task.kind: token-classification needs to know where tokens begin, and the tokenizer "
            f"of {shown(tokenizer.name_or_path)} does not tell; take one with a tokenizer.json"
        )
    found = [_annotated(spec, tags, row) for row in _records(spec, rows)]
    encoding: dict[str, Any] = dict(
        tokenizer(
            shortened([row.text for row in found], tokenizer, max_length),
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
        )
    )
    offsets = encoding.pop("offset_mapping")
    on = [on_tokens(row, spans, tags) for row, spans in zip(found, offsets)]
    _warn(found, offsets, [crossing for _, crossing in on])
    encoding["labels"] = [labels for labels, _ in on]
    if placed:
        encoding["offsets"] = offsets
        encoding["text"] = [row.text for row in found]
        encoding["words"] = [None if row.words is None else len(row.words) for row in found]
    return Dataset.from_dict(encoding)


def _warn(found: Sequence[Annotated], offsets: Sequence[Any], crossing: Sequence[Any]) -> None:
    across = [(i, entity) for i, some in enumerate(crossing) for entity in some]
    if across:
        first, entity = across[0]
        _log.warning(
            "%d of %d entities begin or end within a token, which is theirs as a whole, e.g. %s "
            "in %s",
            len(across),
            sum(len(row.entities) for row in found),
            shown(found[first].text[entity.start : entity.end]),
            place(first),
        )
    cut = [max((end for _, end in spans), default=0) for spans in offsets]
    lost = sum(e.end > end for row, end in zip(found, cut) for e in row.entities)
    if lost:
        _log.warning("%d entities lie beyond max_length, and are neither learned nor told", lost)


def _scores(tags: tuple[str, ...], rows: Logits, encoded: Dataset) -> dict[str, float]:
    """F1, precision and recall of whole entities (seqeval), the share of tokens that are right."""
    from seqeval import metrics as seqeval_metrics  # noqa: PLC0415 - optional

    metrics: Any = seqeval_metrics  # whose types say that 0 is no value of zero_division
    best, total = list[list[int]](), 0.0
    for logits, row in zip(rows, encoded["labels"]):
        labels, logits = torch.tensor(row), logits[: len(row)]
        total += functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        best.append(torch.where(labels == IGNORED, IGNORED, logits.argmax(dim=-1)).tolist())
    wanted = list(sequences(tags, encoded["labels"][:]))
    found = list(sequences(tags, best))
    scores = {
        "f1": metrics.f1_score(wanted, found, zero_division=0),
        "precision": metrics.precision_score(wanted, found, zero_division=0),
        "recall": metrics.recall_score(wanted, found, zero_division=0),
    }
    pairs = [(w, f) for one, other in zip(wanted, found) for w, f in zip(one, other)]
    right = sum(w == f for w, f in pairs) / len(pairs)
    return {k: float(v) for k, v in scores.items()} | {
        "accuracy": right,
        "loss": total / len(pairs),
    }


def _told(tags: tuple[str, ...], found: Logits, encoded: Dataset) -> list[dict[str, Any]]:
    """Of a text its entities; of words a tag each and its probability, None beyond max_length."""
    answers, cut = [], 0
    for row, logits in zip(encoded, found, strict=True):
        row = dict(row)
        asked = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        best = logits.softmax(dim=-1).max(dim=-1)
        numbers, values = best.indices.tolist(), best.values.tolist()
        named, sure = [tags[numbers[i]] for i in asked], [values[i] for i in asked]
        if row["words"] is not None:
            missing = row["words"] - len(asked)
            cut += missing > 0
            answers.append({"prediction": named + [None] * missing})
            answers[-1]["probability"] = sure + [None] * missing
        else:
            cut += bool(row["text"][max((end for _, end in row["offsets"]), default=0) :].strip())
            places = [row["offsets"][i] for i in asked]
            answers.append({"prediction": told(row["text"], places, named, sure)})
    if cut:
        _log.warning("%d of %d rows are told up to max_length only", cut, len(answers))
    return answers
