"""Losses of several continuations of one prompt, which is put through the model once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fedex_lora.tasks.base import IGNORED, evaluating, longest_first, pad, padding
from fedex_lora.tasks.language import as_dataset, row_losses
from fedex_lora.tasks.lazy import Late, PreTrainedTokenizerBase, Tensor, nn, torch

if TYPE_CHECKING:
    from fedex_lora.tasks import labelled
else:
    labelled = Late("fedex_lora.tasks.labelled")  # which needs torch

Row = Mapping[str, list[int]]  # `input_ids` and `labels`, equally long
Losses = list[list[tuple[float, int]]]

logger = logging.getLogger(__name__)


def continuation_losses(
    model: nn.Module,
    groups: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Losses:
    """By group and row: the sum of −log p over its labels in nats, and their number.

    What the rows of a group begin with alike is put through the model once, and the rest of each
    row goes on from the cache of it. A model of which that does not give the same is given every
    row by itself, with a warning.

    Args:
        groups: Rows that begin alike; one may be empty.
        batch_size: How many rows are in memory at a time.
    """
    there = [group for group in groups if group]
    if not there:
        return [[] for _ in groups]
    # the cache is needed for the longest rest, and for a prompt that is padded to another
    one = max(there, key=lambda group: max(len(row["input_ids"]) for row in group) - _common(group))
    other = max(there, key=lambda group: abs(_common(group) - _common(one)))
    tried = [one] if one is other else [one, other]
    with evaluating(model) as device:
        tokens = torch.tensor([one[0]["input_ids"]], device=device)
        head = labelled.head_of(model, tokens)
    alike = all(map(_common, there))
    if head is None or not alike or not _agrees(head, tried, tokenizer, batch_size):
        return _apart(model, groups, tokenizer, batch_size)
    found = iter(_together(head, there, tokenizer, batch_size))
    return [next(found) if group else [] for group in groups]


def _together(
    head: labelled.Head,
    groups: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Losses:
    found: dict[int, list[tuple[float, int]]] = {}
    size = max(1, batch_size // max(map(len, groups)))
    with evaluating(head.model):
        for batch in longest_first([_common(group) for group in groups], size):
            losses = _batch(head, [groups[i] for i in batch], padding(tokenizer))
            found |= zip(batch, losses, strict=True)
    return [found[i] for i in range(len(groups))]


def _common(group: Sequence[Row]) -> int:
    """How many tokens, and their labels, all rows begin with; each has one more at least."""
    most = min(len(row["input_ids"]) for row in group) - 1
    for i in range(most):
        if len({(row["input_ids"][i], row["labels"][i]) for row in group}) > 1:
            return i
    return most


def _batch(head: labelled.Head, groups: Sequence[Sequence[Row]], fill: int) -> Losses:
    device = head.model.device
    lengths = [_common(group) for group in groups]
    prompts = [
        {"input_ids": group[0]["input_ids"][:n], "labels": group[0]["labels"][:n], "there": [1] * n}
        for group, n in zip(groups, lengths)
    ]
    # on the left, so that what follows comes right after
    ids, labels, mask = (
        pad(prompts, key, value, side="left").to(device)
        for key, value in (("input_ids", fill), ("labels", IGNORED), ("there", 0))
    )
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    first = head.body(
        input_ids=ids, attention_mask=mask, use_cache=True, **_positions(head.body, places)
    )
    states = first.last_hidden_state
    before = labelled.losses_of(head, states[:, :-1], labels[:, 1:], first).by_row(len(groups))

    owners = [i for i, group in enumerate(groups) for _ in group]
    whose = torch.tensor(owners, device=device)
    rest = [
        {key: values[n:] for key, values in row.items() if key in ("input_ids", "labels")}
        for group, n in zip(groups, lengths)
        for row in group
    ]
    rest = [{**row, "there": [1] * len(row["input_ids"])} for row in rest]
    ids, labels, there = (
        pad(rest, key, value).to(device)
        for key, value in (("input_ids", fill), ("labels", IGNORED), ("there", 0))
    )
    states, output = states[whose, -1:], first
    if ids.shape[1] > 1:  # nothing follows a row's last token
        cache = first.past_key_values
        cache.reorder_cache(whose)
        places = torch.tensor(lengths, device=device)[whose, None] + torch.arange(
            ids.shape[1] - 1, device=device
        )
        output = head.body(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([mask[whose], there[:, :-1]], dim=1),
            past_key_values=cache,
            use_cache=True,
            **_positions(head.body, places),
        )
        states = torch.cat([states, output.last_hidden_state], dim=1)
    after = labelled.losses_of(head, states, labels, output).by_row(len(rest))
    found: Losses = [[] for _ in groups]
    for owner, loss, count in zip(owners, *after, strict=True):
        found[owner].append((before[0][owner] + loss, before[1][owner] + count))
    return found


def _positions(body: Any, places: Tensor) -> dict[str, Tensor]:
    known = inspect.signature(body.forward).parameters
    return {"position_ids": places} if "position_ids" in known else {}


def _agrees(
    head: labelled.Head,
    groups: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> bool:
    """Whether both ways give the same of some groups."""
    try:
        found = _together(head, groups, tokenizer, batch_size)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
    else:
        own = _apart(head.model, groups, tokenizer, batch_size)
        one, other = (torch.tensor([*chain(*losses)]) for losses in (found, own))
        exact = head.model.dtype == torch.float32
        if torch.allclose(one, other, rtol=1e-3 if exact else 0.02):
            return True
        reason = "other scores than without"
    name = type(head.model).__name__
    logger.warning("%s: a prompt's cache is not shared by its options: %s", name, reason)
    return False


def _apart(
    model: nn.Module,
    groups: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Losses:
    rows = [dict(row) for group in groups for row in group]
    losses = row_losses(model, as_dataset(rows, len(rows), ""), tokenizer, batch_size)
    left = iter(losses[i] for i in range(len(rows)))
    return [[next(left) for _ in group] for group in groups]
