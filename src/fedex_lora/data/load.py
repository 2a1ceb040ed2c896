"""Training and evaluation rows from wherever the recipe says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict

from fedex_lora.data.read import SUFFIXES, kind, line_of, read
from fedex_lora.data.stdlib_docs import LABELS, stdlib_docs
from fedex_lora.errors import UserError
from fedex_lora.recipe import DataSpec
from fedex_lora.seeding import derive
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import one_based

HELD_BACK = {-1, None, "-1", "-1.0", ""}  # labels that are not given away; in CSV they are texts


@dataclass(frozen=True)
class Data:
    """The rows of a run, checked, as they stand in the source (not encoded).

    Attributes:
        train: The training rows to be dealt out; None if each client has its own.
        clients: Each client's training rows, if they come as a file each, in the order given.
        evaluation: The evaluation splits there are with labels, in the task's order of preference.
        description: What it is, for records and model cards.
    """

    train: Dataset | None
    clients: dict[str, Dataset] | None
    evaluation: dict[str, Dataset]
    description: str


@dataclass(frozen=True)
class Split:
    """Rows that have been read, and how errors refer to them."""

    rows: Dataset
    where: str
    line_of: Callable[[int], int] = one_based


def known_labels(spec: DataSpec) -> tuple[str, ...] | None:
    """The classes of data that bring their own, for `build_task`; None for all others."""
    return LABELS if spec.source == "stdlib-docs" else None


def load(spec: DataSpec, task: Task, seed: int) -> Data:
    """Read, check and sample what the recipe's `data` block names.

    A directory (`path`) holds `train`, `validation` and `test` (or the task's other splits) as
    JSON Lines, JSON, CSV or Parquet. With `clients`, a file each, `path` may be given too and
    supplies the evaluation splits alone. Test splits whose labels are held back (missing, or all
    -1 as in GLUE) are left out.

    Args:
        spec: The block.
        task: Checks every row.
        seed: The run's seed, for `train_examples` (with `clients`: of each file) and
            `evaluation_examples` (of each split).

    Raises:
        UserError: Something is missing or unreadable, or there is a row the task cannot use,
            named by file and line.
    """
    splits = _splits(spec, task)
    evaluation = {
        name: _checked(splits[name], task, spec.evaluation_examples, seed, name)
        for name in task.evaluation_splits
        if name in splits and _has_labels(name, splits[name].rows, task)
    }
    train, clients = None, None
    if spec.clients is not None:
        files = _client_splits(spec.clients)
        clients = {
            name: _checked(files[name], task, spec.train_examples, seed, name) for name in files
        }
    else:
        train = _checked(splits["train"], task, spec.train_examples, seed, "train")
    return Data(train, clients, evaluation, _describe(spec, train, clients, evaluation))


def _splits(spec: DataSpec, task: Task) -> dict[str, Split]:
    if spec.source is not None:
        return {k: Split(v, f"{spec.source}, {k}") for k, v in stdlib_docs().items()}
    if spec.name is not None:
        return _hub_splits(spec)
    if spec.path is None:
        return {}
    wanted = task.evaluation_splits if spec.clients else ("train", *task.evaluation_splits)
    return _directory_splits(spec.path, wanted)


def _directory_splits(folder: Path, wanted: tuple[str, ...]) -> dict[str, Split]:
    if not folder.is_dir():
        raise UserError(f"data.path: {folder} is no directory.")
    files = {split: _split_file(folder, split) for split in wanted}
    if "train" in wanted and files["train"] is None:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise UserError(
            f"data.path: {folder} has no file train ({', '.join(SUFFIXES)}); there is: {there}."
        )
    return {split: _file_split(file) for split, file in files.items() if file is not None}


def _split_file(folder: Path, split: str) -> Path | None:
    found = [file for file in folder.iterdir() if file.stem == split and file.is_file()]
    found = sorted(
        (file for file in found if kind(file) in SUFFIXES),
        key=lambda file: (SUFFIXES.index(kind(file)), file.name),
    )
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.path: {folder} has both {names}; keep one of them.")
    return found[0] if found else None


def _file_split(file: Path) -> Split:
    return Split(read(file), str(file), partial(line_of, file))


def _client_splits(files: list[Path]) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for file in files:
        if file.stem in splits:
            raise UserError(
                f"data.clients: two files are named '{file.stem}'; the names of the files are "
                "the names of the clients and must differ."
            )
        splits[file.stem] = _file_split(file)
    return splits


def _hub_splits(spec: DataSpec) -> dict[str, Split]:
    try:
        found = datasets.load_dataset(spec.name or "", spec.config, revision=spec.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"data.name: cannot load '{spec.name}' from the hub: {error}") from error
    assert isinstance(found, DatasetDict)
    if "train" not in found:
        raise UserError(
            f"data.name: '{spec.name}' has no split train; it has {', '.join(map(str, found))}."
        )
    return {str(k): Split(rows, f"{spec.name}, {k}") for k, rows in found.items()}


def _has_labels(name: str, rows: Dataset, task: Task) -> bool:
    """False for a test split whose labels are held back; elsewhere a missing label is an error."""
    if not name.startswith("test"):
        return True
    if not set(task.columns) <= set(rows.column_names):
        return False
    return task.stratify is None or not set(rows[task.stratify]) <= HELD_BACK


def _checked(split: Split, task: Task, examples: int | None, seed: int, name: str) -> Dataset:
    """The rows, all checked, or a seeded sample of them in their own order."""
    task.check(split.rows, split.where, split.line_of)
    if examples is None or examples >= len(split.rows):
        return split.rows
    rng = np.random.default_rng(derive(seed, "sample", name))
    return split.rows.select(sorted(rng.choice(len(split.rows), examples, replace=False)))


def _describe(
    spec: DataSpec,
    train: Dataset | None,
    clients: Mapping[str, Dataset] | None,
    evaluation: Mapping[str, Dataset],
) -> str:
    parts = [str(spec.source or spec.name or spec.path or "the clients' own files")]
    parts += [f"config {spec.config}"] if spec.config else []
    parts += [f"revision {spec.revision}"] if spec.revision else []
    parts += [f"train: {len(train)} rows"] if train is not None else []
    parts += [f"{name}: {len(rows)} rows" for name, rows in (clients or {}).items()]
    return ", ".join(parts + [f"{name}: {len(rows)} rows" for name, rows in evaluation.items()])
