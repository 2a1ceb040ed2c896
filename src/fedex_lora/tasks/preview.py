"""A row as the model sees it: the batch that is made of it, as text, with what is learned of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fedex_lora.tasks.base import IGNORED, Task


@dataclass(frozen=True)
class Piece:
    """A stretch of a row; whether the loss is over it; and its class, if each token has one."""

    text: str
    learned: bool
    label: str = ""


def pieces(task: Task, row: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
    """An encoded row, piece by piece: tokens that are learned and tokens that are not, and the
    label where a row has one.

    Args:
        tokenizer: Or the image processor.
    """
    batch = task.collator(tokenizer)([dict(row)])
    labels = batch["labels"][0].tolist()
    if "input_ids" not in batch:
        size = " × ".join(map(str, batch["pixel_values"].shape[1:]))
        return [Piece(f"pixels {size}", False), _label(task, labels)]
    ids = batch["input_ids"][0].tolist()
    if isinstance(ids[0], list):  # choices, of which the label is one
        texts = [_texts(tokenizer, [choice])[0] for choice in ids]
        return [Piece(f"{text}\n", i == labels) for i, text in enumerate(texts)]
    if not isinstance(labels, list) or task.multi_label:
        return [Piece(_texts(tokenizer, [ids])[0], False), _label(task, labels)]
    if task.peft_task_type == "SEQ_2_SEQ_LM":
        target = [label for label in labels if label != IGNORED]
        return [
            Piece(_texts(tokenizer, [ids])[0] + "\n", False),
            Piece(_texts(tokenizer, [target])[0], True),
        ]
    return _tokens(task, ids, labels, tokenizer)


def _tokens(task: Task, ids: list[int], labels: list[int], tokenizer: Any) -> list[Piece]:
    causal = task.peft_task_type == "CAUSAL_LM"  # of which the first token is not predicted

    def kind(i: int) -> tuple[bool, str, int]:
        learned = labels[i] != IGNORED and not (causal and i == 0)
        if not learned or causal:
            return learned, "", 0
        if task.labels is not None:
            return learned, task.labels[labels[i]], i
        said = tokenizer.decode([labels[i]])  # of a masked token
        return learned, "" if labels[i] == ids[i] else said, i

    runs = [(k, [ids[i] for i in part]) for k, part in groupby(range(len(ids)), kind)]
    texts = _texts(tokenizer, [run for _, run in runs])
    return [Piece(text, k[0], k[1]) for text, (k, _) in zip(texts, runs)]


def _label(task: Task, label: Any) -> Piece:
    if task.labels is None:
        return Piece(f" {label:g}", True)
    if isinstance(label, list):
        found = [name for name, there in zip(task.labels, label) if there]
        return Piece(f" {', '.join(found) or 'none'}", True)
    return Piece(f" {task.labels[label]}", True)


def _texts(tokenizer: Any, runs: Sequence[list[int]]) -> list[str]:
    """The runs of one row as texts that together are the whole row's."""
    decode: Callable[[list[int]], str] = tokenizer.decode
    texts, before, done = [], [], ""
    for run in runs:
        before = before + run
        whole = decode(before)
        # a run may end within a character, which changes the text before it
        texts.append(whole[len(done) :] if whole.startswith(done) else decode(run))
        done = whole
    return texts
