"""ROUGE of generated texts, by the scorer of its reference implementation in Python."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from fedex_lora.errors import check_installed
from fedex_lora.recipe import Problem
from fedex_lora.tasks.metrics import SHARE, Metric

METRICS: Mapping[str, Metric] = dict.fromkeys(("rougeL", "rouge1", "rouge2", "rougeLsum"), SHARE)

_log = logging.getLogger(__name__)


def problems(rouge: bool, generate: bool) -> Iterator[Problem]:
    """What is wrong with the key `rouge` of a task's block."""
    if rouge and not generate:
        yield "rouge", "is of generated texts; set generate: true too"


def asked(rouge: bool) -> Mapping[str, Metric]:
    """The metrics of a task's block with `rouge`.

    Raises:
        UserError: The scorer is not installed.
    """
    if rouge:
        check_installed("rouge_score", "task.rouge", "or set task.rouge: false")
    return METRICS if rouge else {}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean over the texts of each metric's F1, 0 to 1.

    Small letters; words are runs of a-z and 0-9, by their stems (Porter). `rougeLsum` takes each
    line for a sentence. Equal to `rouge_score.RougeScorer(..., use_stemmer=True)`.

    Args:
        references: One of each text.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - optional

    empty = sum(not any(c.isascii() and c.isalnum() for c in text) for text in references)
    if empty:
        _log.warning(
            "%d of %d references have none of the letters a-z and digits that ROUGE counts, and "
            "score 0",
            empty,
            len(references),
        )
    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    found = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: sum(one[name].fmeasure for one in found) / len(found) for name in METRICS}
