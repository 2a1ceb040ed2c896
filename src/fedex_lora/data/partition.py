"""Dealing rows out to clients, with the partitioners of flwr-datasets."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    ShardPartitioner,
)

from fedex_lora.aggregation.seeding import derive
from fedex_lora.errors import DataError, RecipeError
from fedex_lora.recipe import PartitionSpec
from fedex_lora.tasks import Task

WHERE = "federation.partition"
DRAWS = 10
BINS = 5  # of equal width, for labels that are numbers
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def partition(
    rows: Dataset, spec: PartitionSpec, clients: int, seed: int, task: Task
) -> dict[str, Dataset]:
    """Each client's rows; every row is some client's, and no one else's.

    `iid` deals at random; `dirichlet` draws each label's shares from Dir(alpha); `shards` sorts by
    label, cuts into shards and gives each client `shards_per_client` of them (the last shard is
    smaller where the rows do not come out even); `by` gives each value of a column a client.
    Labels that are numbers to be predicted go by 5 bins of equal width.

    Args:
        rows: All training rows.
        spec: The kind and its options. `column` takes the place of the task's label.
        clients: How many clients there are.
        seed: The run's seed.
        task: Its `stratify` is the label column.

    Returns:
        `client-0`, `client-1`, ... (padded with zeros to equal width) and their rows.

    Raises:
        UserError: More clients than rows, a client without rows, a missing column, a
            task without labels dealt by label, or natural ids that are not as many as clients.
    """
    if clients > len(rows):
        raise RecipeError(
            f"federation.clients: {clients} clients, but only {len(rows)} training examples. "
            f"Use at most {len(rows)} clients, or more data."
        )
    # Only the key by which rows are dealt goes through the partitioner: the rows themselves get
    # no helper columns. In random order, as most partitioners cut runs of rows.
    order = np.random.default_rng(derive(seed, "partition", "order")).permutation(len(rows))
    keys = _keys(rows, spec, task)
    shuffled = Dataset.from_dict({"key": [keys[i] for i in order], "row": order})
    indices = _assign(shuffled, spec, clients, seed)
    return {name: rows.select(part) for name, part in zip(client_names(clients), indices)}


def split_validation(
    rows: Dataset, fraction: float, seed: int, client: str = "a client"
) -> tuple[Dataset, Dataset]:
    """A client's rows as (training, validation), at random, at least one row each.

    Args:
        rows: All of the client's rows.
        fraction: The share of them for validation.
        seed: The run's seed.
        client: How an error names the client.

    Raises:
        UserError: There are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(
            f"{client} has {len(rows)} example(s): too few to set some aside for validation. "
            "Use fewer clients, a larger partition.alpha, or evaluation.where: server."
        )
    held_out = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    order = np.random.default_rng(derive(seed, "validation")).permutation(len(rows))
    return rows.select(sorted(order[held_out:])), rows.select(sorted(order[:held_out]))


def client_names(clients: int) -> list[str]:
    """The names of clients that rows are dealt out to."""
    width = len(str(clients - 1))
    return [f"client-{i:0{width}d}" for i in range(clients)]


def _keys(rows: Dataset, spec: PartitionSpec, task: Task) -> Sequence[Any]:
    if spec.kind == "iid":
        return [0] * len(rows)
    column = spec.column or task.stratify
    if column is None:
        raise DataError(
            f"{WHERE}: kind {spec.kind} deals rows by label, and task {task.name} has none. "
            "Name a column to deal by (partition.column), or use kind: iid."
        )
    if column not in rows.column_names:
        raise DataError(
            f"{WHERE}.column: the training rows have no column '{column}'; "
            f"there are: {', '.join(rows.column_names)}."
        )
    values = rows[column][:]
    if column == task.stratify and task.regression:
        return _bins(values)
    return _sortable(values, column)


def _bins(values: Sequence[float | str]) -> list[int]:
    numbers = [float(value) for value in values]  # in CSV they are texts
    edges = np.linspace(min(numbers), max(numbers), BINS + 1)
    return np.digitize(numbers, edges[1:-1]).tolist()


def _sortable(values: Sequence[Any], column: str) -> list[Any]:
    if any(value is None for value in values):
        row = next(i for i, value in enumerate(values) if value is None)
        raise DataError(f"{WHERE}.column: '{column}' is missing in training example {row + 1}.")
    if all(isinstance(value, str) and _WHOLE.fullmatch(value) for value in values):
        return [int(value) for value in values]  # so that CSV is dealt like other formats
    comparable = {type(value) for value in values} in ({str}, {int}, {float}, {bool})
    return list(values) if comparable else [str(value) for value in values]


def _partitioner(spec: PartitionSpec, clients: int, rows: int, seed: int) -> Partitioner:
    if spec.kind == "iid":
        return IidPartitioner(clients)
    if spec.kind == "by":
        return NaturalIdPartitioner("key")
    if spec.kind == "shards":
        size = _shard_size(spec.shards_per_client or 1, clients, rows)
        return ShardPartitioner(
            clients, "key", shard_size=size, keep_incomplete_shard=True, seed=seed
        )
    return DirichletPartitioner(
        clients,
        "key",
        spec.alpha or 1.0,
        min_partition_size=0,
        self_balancing=False,
        seed=seed,
    )


def _shard_size(shards_per_client: int, clients: int, rows: int) -> int:
    """Rounded up, so that no row is left over, but never so that a client is left without."""
    return min(-(-rows // (clients * shards_per_client)), rows // clients)


def _assign(keys: Dataset, spec: PartitionSpec, clients: int, seed: int) -> list[list[int]]:
    """Each client's row numbers; drawn anew while a client has none, up to `DRAWS` times."""
    empty: int | None = None
    for draw in range(DRAWS):
        partitioner = _partitioner(spec, clients, len(keys), derive(seed, "partition", draw))
        indices = _deal(partitioner, keys, spec, clients)
        empty = next((i for i, part in enumerate(indices) if not part), None)
        if empty is None:
            return indices
    assert empty is not None
    raise DataError(
        f"{WHERE}: {client_names(clients)[empty]} is left without examples by kind {spec.kind}, "
        f"in the last of {DRAWS} draws. Use a larger alpha, fewer clients, or another seed."
    )


def _deal(
    partitioner: Partitioner, keys: Dataset, spec: PartitionSpec, clients: int
) -> list[list[int]]:
    partitioner.dataset = keys
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        found = partitioner.num_partitions
        if found != clients:
            raise DataError(
                f"{WHERE}: column '{spec.column}' has {found} different values, but there are "
                f"{clients} clients. Set federation.clients to {found}."
            )
        return [partitioner.load_partition(i)["row"][:] for i in range(clients)]
