"""Training and evaluation rows from wherever the recipe says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from fedex_lora.aggregation.seeding import derive
from fedex_lora.data import digits, stdlib_docs
from fedex_lora.data.images import read_folder, with_images
from fedex_lora.data.quoted import about_rows
from fedex_lora.data.read import SUFFIXES, line_of, read
from fedex_lora.data.text_file import kind
from fedex_lora.disk import reason
from fedex_lora.errors import DataError, RecipeError, StorageError, shown, tally
from fedex_lora.recipe import DataSpec, did_you_mean
from fedex_lora.recipe.data import name_of, several
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import one_based

SOURCES = {  # built in, by `data.source`: the classes, and the rows by split
    "stdlib-docs": (stdlib_docs.LABELS, stdlib_docs.stdlib_docs),
    "digits": (digits.LABELS, digits.digits),
}
_NO_DATA = (OSError, ValueError, RuntimeError)  # RuntimeError: of sets that need a script
HELD_BACK = {-1, None, "-1", "-1.0", ""}  # labels that are not given away; in CSV they are texts


@dataclass(frozen=True)
class Data:
    """The rows of a run, checked, as they stand in the source (not encoded).

    Attributes:
        train: The training rows to be dealt out; None if each client has its own.
        clients: Each client's training rows, if they come as files of each, in the order given.
        validation: Rows that a client is scored on, of those that have such files.
        evaluation: The evaluation splits there are with labels, in the task's order of preference.
        description: What it is, for records and model cards.
    """

    train: Dataset | None
    clients: dict[str, Dataset] | None
    validation: dict[str, Dataset]
    evaluation: dict[str, Dataset]
    description: str


@dataclass(frozen=True)
class Split:
    """Rows that have been read, their columns called as the task does; how errors refer to them,
    and the folder of their file."""

    rows: Dataset
    where: str
    line_of: Callable[[int], int] = one_based
    folder: Path | None = None

    def place(self, row: int) -> str:
        """Where a row stands, as errors say it."""
        return f"{self.where}, line {self.line_of(row)}"


def known_labels(spec: DataSpec) -> tuple[str, ...] | None:
    """The classes of data that bring their own, for `build_task`; None for all others."""
    return SOURCES[spec.source][0] if spec.source else None


@contextmanager
def readable() -> Iterator[None]:
    """A path that the system refuses, as too long or not to be read, is an error that says so."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"data: {shown(str(error.filename))}: {reason(error)}") from None


@readable()
@about_rows()
def load(spec: DataSpec, task: Task, seed: int) -> Data:
    """Read, check and sample what the recipe's `data` block names.

    A directory (`path`) holds `train`, `validation` and `test` (or the task's other splits) as
    JSON Lines, JSON, CSV or Parquet, or for images as a folder of folders, one for each class.
    With `clients`, files (or folders) of each, `path` may be given too and supplies the evaluation
    splits alone. `evaluation` adds splits from elsewhere, or replaces them: for each a local file,
    or a data set of the hub as `NAME[:CONFIG][@SPLIT]`, whose split is `test` if not named. Test
    splits whose labels are held back (missing, or all -1 as in GLUE) are left
    out.

    Args:
        spec: The block.
        task: Checks every row.
        seed: The run's seed, for `train_examples` (with `clients`: of each file) and
            `evaluation_examples` (of each split).

    Raises:
        UserError: Something is missing or unreadable, or there is a row the task cannot use,
            named by file and line.
    """
    wanted = task.evaluation_splits if spec.clients else ("train", *task.evaluation_splits)
    splits = _splits(spec, task, wanted) | _further_splits(spec, task)
    evaluation = {
        name: _checked(splits[name], task, spec.evaluation_examples, seed, name)
        for name in _labelled(splits, task)
    }
    train, clients = None, None
    if spec.clients is not None:
        _check_names(spec)
        clients = {
            name: of_files(files, task, spec.train_examples, seed, name, spec.on_disk)
            for name, files in spec.files()
        }
    else:
        train = _checked(splits["train"], task, spec.train_examples, seed, "train")
    validation = {name: load_validation(spec, task, seed, name) for name in spec.validation}
    description = _describe(spec, train, clients, evaluation)
    return Data(train, clients, validation, evaluation, description)


@readable()
@about_rows()
def load_evaluation(
    spec: DataSpec, task: Task, seed: int, only: str | None = None
) -> dict[str, Dataset]:
    """The labelled rows that a model can be scored on, by split; training rows are not needed.

    Args:
        spec: As for `load`; `path` may also be a single file, whose name is that of its split.
        task: Checks every row.
        seed: For `evaluation_examples`.
        only: One split, which need not be one of the task's evaluation splits; None for all those.

    Raises:
        UserError: As for `load`, or there are no such rows.
    """
    if spec.path is not None and spec.path.is_file():
        splits = {name_of(spec.path): file_split(spec.path, task, spec.on_disk)}
        found = list(splits)
    else:
        splits = _splits(spec, task, (*task.evaluation_splits, *([only] if only else [])))
        splits |= _further_splits(spec, task)
        found = _labelled(splits, task)
    where = spec.source or spec.name or spec.path or "data.clients"
    if only is not None and only not in splits:
        has = ", ".join(splits) or "none of the task's splits"
        raise DataError(f"`split`: {where} has no split '{only}'; it has {has}.")
    if not found and only is None:
        names = ", ".join(task.evaluation_splits)
        raise RecipeError(f"data: {where} has no labelled rows to evaluate on (splits {names}).")
    return {
        name: _checked(splits[name], task, spec.evaluation_examples, seed, name)
        for name in ([only] if only else found)
    }


@readable()
@about_rows()
def load_client(spec: DataSpec, task: Task, seed: int, name: str, file: Path) -> Dataset:
    """One client's own rows, checked and sampled as `load` does for a client of that name.

    Raises:
        UserError: As for `load`.
    """
    return _checked(file_split(file, task, spec.on_disk), task, spec.train_examples, seed, name)


@readable()
@about_rows()
def load_validation(spec: DataSpec, task: Task, seed: int, name: str) -> Dataset:
    """The rows of `data.validation` that a client is scored on, checked as `load` does.

    Raises:
        UserError: As for `load`.
    """
    return of_files(several(spec.validation[name]), task, None, seed, name, spec.on_disk)


def _labelled(splits: Mapping[str, Split], task: Task) -> list[str]:
    """The splits that the task can be evaluated on, in its order of preference."""
    names = [name for name in task.evaluation_splits if name in splits]
    return [name for name in names if _has_labels(name, splits[name].rows, task)]


def _splits(spec: DataSpec, task: Task, wanted: tuple[str, ...]) -> dict[str, Split]:
    if spec.source is not None:
        rows = SOURCES[spec.source][1]()
        return {k: Split(_named(v, task), f"{spec.source}, {k}") for k, v in rows.items()}
    if spec.name is not None:
        return _hub_splits(spec, wanted, task)
    return {} if spec.path is None else _directory_splits(spec.path, wanted, task, spec.on_disk)


def _directory_splits(
    folder: Path, wanted: tuple[str, ...], task: Task, on_disk: bool
) -> dict[str, Split]:
    if not folder.is_dir():
        raise RecipeError(f"data.path: {folder} is no directory.")
    files = {split: _split_file(folder, split, task) for split in wanted}
    if "train" in wanted and files["train"] is None:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise RecipeError(
            f"data.path: {folder} has no file train ({', '.join(SUFFIXES)}); there is: {there}."
        )
    return {
        split: file_split(file, task, on_disk) for split, file in files.items() if file is not None
    }


def _split_file(folder: Path, split: str, task: Task) -> Path | None:
    found = [file for file in folder.iterdir() if name_of(file) == split and file.is_file()]
    found = sorted(
        (file for file in found if kind(file) in SUFFIXES),
        key=lambda file: (SUFFIXES.index(kind(file)), file.name),
    )
    if task.image and (folder / split).is_dir():
        found.append(folder / split)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise RecipeError(f"data.path: {folder} has both {names}; keep one of them.")
    return found[0] if found else None


def file_split(file: Path, task: Task, on_disk: bool = False) -> Split:
    if task.image and file.is_dir():
        return Split(_named(read_folder(file), task), str(file), folder=file)
    on_disk = on_disk and task.image is None  # of these datasets takes no column from a mapped file
    return Split(_named(read(file, on_disk), task), str(file), partial(line_of, file), file.parent)


def _named(rows: Dataset, task: Task) -> Dataset:
    """The rows with `task.renamed` columns under the task's names."""
    new = {theirs: ours for ours, theirs in task.renamed.items() if theirs in rows.column_names}
    hidden = [name for name in new.values() if name in rows.column_names and name not in new]
    return rows.remove_columns(hidden).rename_columns(new) if new else rows


def _check_names(spec: DataSpec) -> None:
    names = [name for name, _ in spec.files()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"data.clients: two files are named '{twice}'; the names of the files are the names of "
            "the clients and must differ. Name the clients: clients: {NAME: FILE, ...}."
        )


def of_files(
    files: Sequence[Path],
    task: Task,
    examples: int | None,
    seed: int,
    name: str,
    on_disk: bool = False,
) -> Dataset:
    """The rows of one or several files, in order, checked, or a seeded sample of them.

    Args:
        files: Patterns, too, of files in the order of their names.
        on_disk: Whether the rows are mapped into memory, not held there.
    """
    found = [one for file in files for one in matching(file)]
    parts = [_usable(file_split(file, task, on_disk), task) for file in found]
    return _sampled(_together(parts, found, task), examples, seed, name)


def matching(file: Path) -> list[Path]:
    """The files that a pattern (*, ?, [...]) names; any other path as it is."""
    if file.exists() or not set("*?[") & set(str(file)):
        return [file]
    whole = file.expanduser().absolute()
    found = sorted(Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
    if not found:
        raise StorageError(f"{file}: no file fits this pattern.")
    return found


def _together(parts: Sequence[Dataset], files: Sequence[Path], task: Task) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    where = ", ".join(map(str, files))
    try:
        rows = datasets.concatenate_datasets(list(parts))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{where}: the files of one client differ in what their columns hold: {error}"
        ) from error
    if any(part.column_names != parts[0].column_names for part in parts):
        task.check(rows, where)  # what one form lacks is None there
    return rows


def _hub_splits(spec: DataSpec, wanted: tuple[str, ...], task: Task) -> dict[str, Split]:
    try:
        found = datasets.load_dataset(spec.name or "", spec.config, revision=spec.revision)
    except _NO_DATA as error:
        raise RecipeError(f"data.name: cannot load '{spec.name}' from the hub: {error}") from error
    assert isinstance(found, DatasetDict)
    if "train" in wanted and "train" not in found:
        raise RecipeError(
            f"data.name: '{spec.name}' has no split train; it has {', '.join(map(str, found))}."
        )
    return {str(k): Split(_named(rows, task), f"{spec.name}, {k}") for k, rows in found.items()}


def _further_splits(spec: DataSpec, task: Task) -> dict[str, Split]:
    """What `data.evaluation` names."""
    for name in spec.evaluation:
        if name not in task.evaluation_splits:
            raise RecipeError(
                f"data.evaluation.{name}: no evaluation split of the task, which has "
                f"{', '.join(task.evaluation_splits)}{did_you_mean(name, task.evaluation_splits)}"
            )
    return {
        name: _further(source, name, task, spec.on_disk) for name, source in spec.evaluation.items()
    }


def _further(source: str, name: str, task: Task, on_disk: bool) -> Split:
    if kind(Path(source)) in SUFFIXES:
        return file_split(Path(source), task, on_disk)
    whole, _, split = source.partition("@")
    hub, _, config = whole.partition(":")
    try:
        rows = datasets.load_dataset(hub, config or None, split=split or "test")
    except _NO_DATA as error:
        raise RecipeError(
            f"data.evaluation.{name}: cannot load '{source}' from the hub: {error}. Expected "
            f"NAME[:CONFIG][@SPLIT], or a file ({', '.join(SUFFIXES)})."
        ) from error
    assert isinstance(rows, Dataset)
    return Split(_named(rows, task), source)


def _has_labels(name: str, rows: Dataset, task: Task) -> bool:
    """False for a test split whose labels are held back; elsewhere a missing label is an error."""
    if not name.startswith("test"):
        return True
    if not set(task.columns) <= set(rows.column_names):
        return False
    return task.stratify is None or not set(rows[task.stratify]) <= HELD_BACK


def _checked(split: Split, task: Task, examples: int | None, seed: int, name: str) -> Dataset:
    """The rows, all checked, or a seeded sample of them in their own order."""
    return _sampled(_usable(split, task), examples, seed, name)


def _usable(split: Split, task: Task) -> Dataset:
    """The rows, all checked."""
    rows = split.rows
    for ours, theirs in task.renamed.items():
        if ours in task.columns and ours not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise DataError(
                f"{split.where}: no column '{theirs}', which task.columns.{ours} names; there are: "
                f"{there}."
            )
    if task.image:
        rows = with_images(rows, task.image, split.folder, split.where)
    task.check(rows, split.where, split.line_of)
    return rows


def _sampled(rows: Dataset, examples: int | None, seed: int, name: str) -> Dataset:
    if examples is None or examples >= len(rows):
        return rows
    rng = np.random.default_rng(derive(seed, "sample", name))
    return rows.select(sorted(rng.choice(len(rows), examples, replace=False)))


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
    parts += [tally({n: len(rows) for n, rows in clients.items()}) + " rows"] if clients else []
    for name, rows in evaluation.items():
        source = f" of {spec.evaluation[name]}" if name in spec.evaluation else ""
        parts.append(f"{name}: {len(rows)} rows{source}")
    return ", ".join(parts)
