"""Metrics as pure functions of predictions and labels (scikit-learn, SciPy)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedex_lora.tasks.lazy import sklearn_metrics, stats

NO_SUCH_CLASS: Any = 0  # what F1 is then, without a warning; the stubs know only "warn"
Metric = Callable[[NDArray, NDArray], float]


def accuracy(predictions: NDArray, labels: NDArray) -> float:
    """The share of predictions that are right."""
    return float(sklearn_metrics.accuracy_score(labels, predictions))


def f1(predictions: NDArray, labels: NDArray) -> float:
    """The F1 score of class 1 of two; 0 if there is no such label and no such prediction."""
    return _f1(predictions, labels, "binary")


def macro_f1(predictions: NDArray, labels: NDArray) -> float:
    """The mean F1 score over the classes that occur in labels or predictions."""
    return _f1(predictions, labels, "macro")


def matthews(predictions: NDArray, labels: NDArray) -> float:
    """Matthews' correlation coefficient; 0 if all predictions or all labels are the same."""
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: NDArray, labels: NDArray) -> float:
    """Pearson's correlation; 0 if all predictions or all labels are the same."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: NDArray, labels: NDArray) -> float:
    """Spearman's rank correlation; 0 if all predictions or all labels are the same."""
    return _correlation(stats.spearmanr, predictions, labels)


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token; infinite where that overflows.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    return math.exp(loss) if math.isnan(loss) or loss < 700 else math.inf


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of texts that are equal but for white space around them.

    Example:
        >>> exact_match([" 42\\n", "7"], ["42", "8"])
        0.5
    """
    pairs = list(zip(predictions, references, strict=True))
    return sum(p.strip() == r.strip() for p, r in pairs) / len(pairs)


def mean_loss(nll: ArrayLike, tokens: ArrayLike) -> float:
    """Σ nll / Σ tokens in float64: every token counts the same, whatever row it is in."""
    return float(np.sum(nll, dtype=np.float64) / np.sum(tokens))


RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "exact_match"), (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("BLEU", "METEOR", "ROUGE_L"), (0.0, 1.0)),
    "CIDEr": (0.0, 10.0),
    "NIST": (0.0, 100.0),
    "loss": (0.0, math.inf),
    "perplexity": (1.0, math.inf),
}


def out_of_range(
    name: str, value: float, own: Mapping[str, tuple[float, float]] | None = None
) -> str | None:
    """The range of a metric's values in words, if `value` is not in it; None too for a metric
    whose range is not known, as long as the value is finite.

    Args:
        own: Ranges of a task's own metrics, beside `RANGES`.

    Example:
        >>> out_of_range("accuracy", 1e300), out_of_range("accuracy", 1.0)
        ('0 to 1', None)
    """
    ranges = {**RANGES, **(own or {})}
    if name not in ranges:
        return None if math.isfinite(value) else "a finite number"
    low, high = ranges[name]
    slack = 1e-6  # of rounding
    return None if low - slack <= value <= high + slack else f"{low:g} to {high:g}"


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _f1(predictions: NDArray, labels: NDArray, average: str) -> float:
    found = sklearn_metrics.f1_score(
        labels, predictions, average=average, zero_division=NO_SUCH_CLASS
    )
    return float(found)


def _correlation(function: Callable, predictions: NDArray, labels: NDArray) -> float:
    if not np.isfinite(predictions).all():
        return math.nan
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)
