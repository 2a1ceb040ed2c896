"""A first recipe for somebody's own files, with a comment on every key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.data.read import read
from fedex_lora.errors import DataError, did_you_mean, some
from fedex_lora.recipe import TaskSpec, spec_of
from fedex_lora.recipe.meanings import MEANINGS

MOST_LABELS = 100
_COMMENT = 44  # the column where comments begin
_WIDTH = 100


def task_fields(spec: type[TaskSpec], columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys of a task that its defaults do not settle for rows with these columns.

    Yields:
        (key, a guess or ""): columns that the rows call otherwise, and keys without a default.

    Example:
        >>> from fedex_lora.recipe import spec_of
        >>> list(task_fields(spec_of("text-classification"), ["review", "label"]))
        [('text_column', 'review')]
    """
    taken = {f.default for key, f in spec.model_fields.items() if key.endswith("_column")}
    left = [name for name in columns if name not in taken]
    other = [key for form in spec.forms if form != form_of(spec, columns) for key in form]
    for key, field in spec.model_fields.items():
        if key in ("labels", *other):  # the rows have them
            continue
        if key.endswith("_column") and isinstance(field.default, str):
            if field.default not in columns:
                yield key, left.pop(0) if left else ""
        elif field.is_required() and key != "kind":
            guess = {"prompt": f"{{{columns[0]}}}\n", "response": f"{{{columns[-1]}}}"}
            yield key, guess.get(key, "")


def form_of(spec: type[TaskSpec], columns: Sequence[str]) -> tuple[str, ...]:
    """Of a task whose rows may have one of several forms, the keys of the form that these columns
    are of, or else of the first; of others nothing.

    Example:
        >>> from fedex_lora.recipe import spec_of
        >>> form_of(spec_of("token-classification"), ["id", "text", "entities"])
        ('text_column', 'entities_column')
    """
    fits = (
        form for form in spec.forms if {spec.model_fields[k].default for k in form} <= {*columns}
    )
    return next(chain(fits, spec.forms), ())


def labels_of(files: Sequence[Path], column: str, entities: bool = False) -> list[str]:
    """All classes that the rows of some files have in a column, sorted; numbers by value.

    Args:
        entities: Whether they are tags or entities, whose classes they are then: PER of B-PER.

    Raises:
        UserError: There is no such column, or there are more values than classes can be.
    """
    found: set[str] = set()
    for file in files:
        rows = read(file)
        if column not in rows.column_names:
            near = did_you_mean(column, rows.column_names)
            raise DataError(f"{file}: no column {column!r}; it has {some(rows.column_names)}{near}")
        for value in rows[column]:
            found.update(_classes(value, entities))
            if len(found) > MOST_LABELS:
                raise DataError(
                    f"{file}: column {column!r} has more than {MOST_LABELS} different values, so "
                    "it holds no classes; name another with `set=task.label_column=NAME`"
                )
    return sorted(found, key=lambda text: (0, float(text), "") if _number(text) else (1, 0, text))


def _classes(value: Any, entities: bool) -> Iterator[str]:
    for one in value if isinstance(value, list) else [value]:
        text = one.get("label") if isinstance(one, Mapping) else one
        if text is not None and not (entities and text == "O"):
            yield re.sub("^[BI]-", "", str(text)) if entities else str(text)


def _number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def first_recipe(
    name: str,
    model: str,
    task: Mapping[str, Any],
    method: str,
    files: Sequence[Path],
    evaluation: Path | None,
) -> dict[str, Any]:
    """The values of a recipe.

    Args:
        task: Its block, whole.
        files: One for each client, or one directory that is dealt out.
        evaluation: A directory with the server's rows to score on; without one, and with files,
            each client keeps a tenth of its rows for that.
    """
    chosen, spec = METHODS[method], spec_of(task["kind"])
    language = spec is None or spec.vocabulary
    values: dict[str, Any] = {"name": name, "seed": 0, "model": {"name": model}}
    if chosen.trains != "all":
        values["lora"] = {"r": 8, "lora_alpha": 16}
    cut = {"rank": 8} if chosen.residual == "truncated" else {}
    values["method"] = {"name": method, **cut}
    values["federation"] = {"rounds": 5}
    length = task.get("max_length", 512 if language else 128)
    values["task"] = {**task, "max_length": length}
    if len(files) == 1:
        values["federation"] |= {"clients": 3, "partition": {"kind": "iid"}}
        values["data"] = {"path": str(files[0])}
    else:
        values["data"] = {"clients": [str(file) for file in files]}
        values["data"] |= {"path": str(evaluation)} if evaluation else {}
    values["training"] = {
        "learning_rate": 2e-4 if language else 1e-3,
        "per_device_train_batch_size": 4 if language else 16,
        "num_train_epochs": 1,
    }
    if len(files) > 1 and evaluation is None:
        values["evaluation"] = {"where": "clients", "client_fraction": 0.1}
    values["engine"] = {"threads": 2, "precision": "auto"}
    return values


def commented(values: Mapping[str, Any], head: str) -> str:
    """A recipe as YAML, each key with what it means."""
    lines = [f"# {head}"]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"{key}:"]
            lines += chain.from_iterable(_line(f"{key}.{k}", v) for k, v in value.items())
        else:
            lines += _line(key, value)
    return "\n".join(lines) + "\n"


_TRAINING = {
    "training.learning_rate": "Names of transformers' TrainingArguments.",
    "training.per_device_train_batch_size": "Rows of a step.",
    "training.num_train_epochs": "At each client, in each round.",
}


def _line(key: str, value: Any) -> list[str]:
    block, _, name = key.rpartition(".")
    text = f"{'  ' * bool(block)}{name}: {_value(value)}"
    meaning = _TRAINING.get(key) or MEANINGS.get(key, ("", ""))[1]
    if not meaning:
        return [text]
    line = f"{text:<{_COMMENT - 2}}  # {meaning}"
    return [line] if len(line) <= _WIDTH else [f"{'  ' * bool(block)}# {meaning}", text]


def _value(value: Any) -> str:
    """In one line, and so that YAML reads the same back."""
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) else f"{value:.1e}"
    plain = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    plain = plain.removesuffix("\n").removesuffix("\n...")
    return plain if "\n" not in plain and yaml.safe_load(plain) == value else json.dumps(value)
