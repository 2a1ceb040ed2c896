"""How many rows there were, and how many of them could not be used."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset

from fedex_lora.tasks.base import unasked

Counts = dict[str, dict[str, int]]  # by client or split


def trained_on(rows: Mapping[str, Dataset], encoded: Mapping[str, Dataset]) -> Counts:
    """By client: `rows`, and of these `left_out`, which the task made nothing of: mostly rows that
    are too long.

    Args:
        rows: As they stand in the source.
        encoded: The same after the task's `encode`.
    """
    return {
        name: {"rows": len(part), "left_out": len(part) - len(encoded[name])}
        for name, part in rows.items()
    }


def scored_on(rows: Mapping[str, Dataset], encoded: Mapping[str, Dataset]) -> Counts:
    """`trained_on` by client or split, and `not_asked`: rows whose prompt alone fills the length
    there is, so that they count as answered wrongly.

    Args:
        encoded: The same after the task's `encode_evaluation`.
    """
    labels = {name: part.select_columns("labels").to_list() for name, part in encoded.items()}
    return {
        name: {**counts, "not_asked": sum(map(unasked, labels[name]))}
        for name, counts in trained_on(rows, encoded).items()
    }
