"""Every row is dealt to exactly one client, by label, column or chance; what cannot be is said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedex_lora.data.partition import _bins, partition, split_validation
from fedex_lora.errors import UserError
from fedex_lora.recipe import PartitionSpec, task_spec
from fedex_lora.tasks import build_task

SST2 = build_task(task_spec(kind="glue", name="sst2"))
STSB = build_task(task_spec(kind="glue", name="stsb"))
TEXT = build_task(task_spec(kind="causal-lm"))

IID = PartitionSpec()
DIRICHLET = PartitionSpec(kind="dirichlet", alpha=0.3)
SHARDS = PartitionSpec(kind="shards", shards_per_client=2)
SHARD = PartitionSpec(kind="shards", shards_per_client=1)


def table(count: int, **more: Any) -> Dataset:
    return Dataset.from_dict({"row": range(count), "label": [i % 2 for i in range(count)], **more})


def dealt(parts: dict[str, Dataset]) -> list[list[int]]:
    return [part["row"][:] for part in parts.values()]


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from([IID, DIRICHLET, SHARDS, SHARD]),
    count=st.integers(1, 60),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_every_row_goes_to_exactly_one_client(kind, count, clients, seed):
    rows = table(count)
    try:
        parts = partition(rows, kind, clients, seed, SST2)
    except UserError:
        assert clients > count or kind is DIRICHLET
        return
    assert sorted(row for part in dealt(parts) for row in part) == list(range(count))
    assert len(parts) == clients and all(dealt(parts))
    assert all(part.column_names == rows.column_names for part in parts.values())


@pytest.mark.parametrize("spec", [IID, DIRICHLET, SHARDS])
def test_the_seed_decides(spec):
    one, again, other = (dealt(partition(table(60), spec, 4, s, SST2)) for s in (0, 0, 1))
    assert one == again != other


def test_iid_is_random_and_even():
    parts = dealt(partition(table(101), IID, 4, 0, SST2))
    assert sorted(map(len, parts)) == [25, 25, 25, 26]
    assert all(part != sorted(part) for part in parts)


def test_dirichlet_skews_more_with_a_smaller_alpha():
    def skew(alpha: float) -> float:
        spec = PartitionSpec(kind="dirichlet", alpha=alpha)
        parts = [p for s in range(10) for p in partition(table(400), spec, 4, s, SST2).values()]
        counts = [Counter(part["label"]) for part in parts]
        return sum(abs(c[0] - c[1]) for c in counts) / 4000

    assert skew(0.1) > 0.3 > 0.1 > skew(1000)


def test_shards_hold_few_labels():
    rows = Dataset.from_dict({"row": range(400), "label": [i % 10 for i in range(400)]})
    parts = partition(rows, SHARDS, 10, 0, SST2).values()
    assert all(len(part) == 40 and len(set(part["label"])) <= 2 for part in parts)


def test_a_column_takes_the_place_of_the_label():
    rows = table(100, place=["a"] * 50 + ["b"] * 50)
    spec = PartitionSpec(kind="shards", shards_per_client=1, column="place")
    parts = partition(rows, spec, 2, 0, TEXT).values()
    assert sorted(set(part["place"]).pop() for part in parts) == ["a", "b"]


def test_numbers_to_be_predicted_go_by_five_bins():
    scores = [i * 5 / 99 for i in range(100)]
    rows = Dataset.from_dict({"row": range(100), "label": scores})
    spec = PartitionSpec(kind="shards", shards_per_client=1)
    parts = partition(rows, spec, 5, 0, STSB).values()
    spans = sorted((min(part["label"]), max(part["label"])) for part in parts)
    assert all(low == pytest.approx(i, abs=0.06) for i, (low, _) in enumerate(spans))
    assert all(part.features["label"] == rows.features["label"] for part in parts)


def test_numbers_that_are_texts_are_dealt_like_numbers():
    scores, layers = [i / 20 for i in range(100)], list(range(11)) * 10
    for spec, task, column in [
        (SHARDS, STSB, scores),
        (SHARDS, SST2, layers),
        (PartitionSpec(kind="by", column="label"), SST2, layers),
    ]:
        rows = Dataset.from_dict({"row": range(len(column)), "label": column})
        texts = Dataset.from_dict({"row": range(len(column)), "label": list(map(str, column))})
        one, other = (dealt(partition(table, spec, 11, 0, task)) for table in (rows, texts))
        assert one == other


@pytest.mark.parametrize("ids", [["x", "y", "z"], [10, 9, 2], ["x", 1, 2.5]])
def test_by_a_natural_id(ids, capfd):
    column = [str(value) for value in ids] if len({type(v) for v in ids}) > 1 else ids
    rows = table(90, site=column * 30)
    parts = partition(rows, PartitionSpec(kind="by", column="site"), 3, 0, SST2)
    assert [set(part["site"]) for part in parts.values()] == [{i} for i in sorted(column)]
    assert [len(part) for part in parts.values()] == [30, 30, 30]
    assert capfd.readouterr().err == ""


def test_bins_are_of_equal_width_and_the_greatest_number_is_in_the_last():
    assert _bins([0.0, 0.9, 1.1, 2.5, 3.9, 4.1, 5.0]) == [0, 0, 1, 2, 3, 4, 4]


def test_names_sort_as_numbers():
    names = list(partition(table(30), IID, 11, 0, SST2))
    assert names == sorted(names) and names[0] == "client-00" and names[-1] == "client-10"


@pytest.mark.parametrize(
    "spec, clients, task, message",
    [
        (IID, 21, SST2, "21 clients, but only 20 training examples. Use at most 20"),
        (DIRICHLET, 3, TEXT, "task causal-lm has none. Name a column"),
        (SHARDS, 3, TEXT, "kind shards deals rows by label"),
        (PartitionSpec(kind="by", column="site"), 3, SST2, "no column 'site'; there are: row"),
        (PartitionSpec(kind="by", column="label"), 3, SST2, "'label' has 2 different values"),
        (PartitionSpec(kind="by", column="gap"), 2, SST2, "'gap' is missing in training example 3"),
    ],
)
def test_what_cannot_be_dealt_is_said(spec, clients, task, message):
    rows = table(20, gap=["a", "b", None, "a"] * 5)
    with pytest.raises(UserError, match=message):
        partition(rows, spec, clients, 0, task)


def test_a_client_left_without_rows_is_named():
    spec = PartitionSpec(kind="dirichlet", alpha=0.001)
    with pytest.raises(UserError, match=r"client-\d is left without examples .* larger alpha"):
        partition(table(40), spec, 8, 0, SST2)


@pytest.mark.parametrize("count, fraction, held_out", [(10, 0.2, 2), (2, 0.001, 1), (3, 0.99, 2)])
def test_split_validation(count, fraction, held_out):
    train, validation = split_validation(table(count), fraction, 5)
    assert len(validation) == held_out
    assert sorted(train["row"][:] + validation["row"][:]) == list(range(count))
    assert split_validation(table(count), fraction, 5)[1][:] == validation[:]


def test_one_row_cannot_be_split():
    with pytest.raises(UserError, match=r"^a client has 1 .* too few to set some aside"):
        split_validation(table(1), 0.5, 0)
    with pytest.raises(UserError, match=r"^client-3 has 1 "):
        split_validation(table(1), 0.5, 0, client="client-3")
