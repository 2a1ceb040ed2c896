"""What a client of a Flower app answers, and whether it can be aggregated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedex_lora.errors import UpdateRefused
from fedex_lora.federation.checks import LARGEST
from fedex_lora.flower.arrays import tensors_of


def read_reply(
    content: RecordDict, sent: Mapping[str, Tensor], weighted_by: str
) -> tuple[float, dict[str, Tensor]]:
    """The weight and the tensors of a reply.

    Args:
        sent: What the client was sent, by name.
        weighted_by: The metric that is the weight.

    Raises:
        UpdateRefused: Not one ArrayRecord and one MetricRecord, no positive weight, other names or
            shapes than were sent, an entry that is not finite or larger than any network's.
    """
    for kind, found in (
        ("ArrayRecord", len(content.array_records)),
        ("MetricRecord", len(content.metric_records)),
    ):
        if found != 1:
            raise UpdateRefused(f"it has {found} {kind}s; expected exactly one")
    weight = next(iter(content.metric_records.values())).get(weighted_by)
    if not isinstance(weight, int | float):
        what = "no" if weight is None else f"{weight!r} as"
        raise UpdateRefused(
            f"its MetricRecord has {what} {weighted_by!r}; expected the number of "
            "rows it trained on"
        )
    if not 0 < weight < math.inf:
        raise UpdateRefused(f"{weighted_by} is {weight}; expected a positive number")
    tensors = tensors_of(next(iter(content.array_records.values())))
    check_like(tensors, sent)
    for name, tensor in tensors.items():
        largest = torch.linalg.vector_norm(tensor, math.inf).item() if tensor.numel() else 0.0
        if not largest <= LARGEST:
            raise UpdateRefused(
                f"array {name!r} has an entry of {largest}; expected finite numbers, at most "
                f"{LARGEST:g}"
            )
    return float(weight), tensors


def check_like(tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> None:
    """Raises UpdateRefused where names or shapes are not those that were sent."""
    for names, what in (
        (sent.keys() - tensors.keys(), "is missing"),
        (tensors.keys() - sent.keys(), "was not sent"),
    ):
        if names:
            raise UpdateRefused(
                f"array {min(names)!r} {what}; expected the {len(sent)} arrays of round 1, under "
                "the same names"
            )
    for name, tensor in tensors.items():
        if tensor.shape != sent[name].shape:
            raise UpdateRefused(
                f"array {name!r} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(sent[name].shape)}: the model and LoRA rank of round 1"
            )
