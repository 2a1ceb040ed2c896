"""Batches without padding: rows one after the other in one sequence, with positions of their own.

A transformers model that is given positions and no mask lets no token attend beyond its own row:
positions that begin anew say where rows begin, to flash attention as to the others. Models that do
not are found by trying, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedex_lora.errors import RecipeError
from fedex_lora.tasks.base import IGNORED, Batch, evaluating
from fedex_lora.tasks.lazy import Dataset, Tensor, nn, torch

ROUNDING = {"torch.float32": 1e-3}  # of logits, relative; in half precision:
ROUNDING_HALF = 0.1


def packed(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Encoded rows as one sequence (1 × tokens): `input_ids`, `position_ids`, `labels`.

    A row's first label is passed over: the token before it is another row's.

    Example:
        >>> rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1]} for i in (5, 7)]
        >>> [values.tolist() for values in packed(rows).values()]
        [[[5, 6, 7, 8]], [[0, 1, 0, 1]], [[-100, 6, -100, 8]]]
    """
    ids = [i for row in rows for i in row["input_ids"]]
    positions = [i for row in rows for i in range(len(row["input_ids"]))]
    labels = [i for row in rows for i in (IGNORED, *row["labels"][1:])]
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.tensor([v]) for name, v in zip(names, (ids, positions, labels))}


def check_packing(model: nn.Module, rows: Dataset) -> None:
    """Puts two rows through the model, packed and one by one.

    Raises:
        UserError: Its logits differ by more than rounding: it would mix rows.
    """
    shortest = sorted(rows, key=lambda row: len(row["input_ids"]))[:2]  # type: ignore[index]
    pair = [dict(row) for row in (shortest * 2)[:2]]
    with evaluating(model) as device:
        try:
            alone = [_logits(model, packed([row]), device) for row in pair]
            both = _logits(model, packed(pair), device)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise RecipeError(f"task.packing: {_UNABLE}: {error}") from error
    wanted = torch.cat(alone, dim=1)
    missed = ((both - wanted).norm() / wanted.norm()).item()
    if not missed <= ROUNDING.get(str(next(model.parameters()).dtype), ROUNDING_HALF):
        raise RecipeError(
            f"task.packing: {_UNABLE}: its logits change by {missed:.2g} (relative) where another "
            "row stands before a row"
        )


_UNABLE = "this model cannot keep rows apart by their positions; leave it out"


def _logits(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    return model(**inputs).logits.float()
