"""Metrics as pure functions of predictions and labels (scikit-learn, SciPy)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedex_lora.tasks.lazy import numpy, sklearn_metrics, stats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NO_SUCH_CLASS: Any = 0  # what F1 is then, without a warning; the stubs know only "warn"


@dataclass(frozen=True)
class Metric:
    """How one of a task's numbers is read.

    Attributes:
        higher_is_better: Whether it is to grow.
        range: Between which values it lies; None for any finite ones.
    """

    higher_is_better: bool = True
    range: tuple[float, float] | None = None

    def expected(self, value: float) -> str | None:
        """What it can be, in words, if it cannot be `value`.

        Example:
            >>> SHARE.expected(1e300), SHARE.expected(1.0), Metric().expected(math.inf)
            ('0 to 1', None, 'a finite number')
        """
        if self.range is None:
            return None if math.isfinite(value) else "a finite number"
        low, high = self.range
        slack = 1e-6  # of rounding
        return None if low - slack <= value <= high + slack else f"{low:g} to {high:g}"


SHARE = Metric(range=(0.0, 1.0))
CORRELATION = Metric(range=(-1.0, 1.0))
LOSS = Metric(higher_is_better=False, range=(0.0, math.inf))
PERPLEXITY = Metric(higher_is_better=False, range=(1.0, math.inf))


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


def rmse(predictions: NDArray, labels: NDArray) -> float:
    """The root of the mean squared error; infinite where a prediction is no number."""
    return _error(sklearn_metrics.root_mean_squared_error, predictions, labels)


def mae(predictions: NDArray, labels: NDArray) -> float:
    """The mean absolute error; infinite where a prediction is no number."""
    return _error(sklearn_metrics.mean_absolute_error, predictions, labels)


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
    return float(numpy.sum(nll, dtype=numpy.float64) / numpy.sum(tokens))


ERROR = Metric(higher_is_better=False, range=(0.0, math.inf))

OF_LABELS: Mapping[str, tuple[Callable[[NDArray, NDArray], float], Metric]] = {
    "accuracy": (accuracy, SHARE),
    "f1": (f1, SHARE),
    "macro_f1": (macro_f1, SHARE),
    "matthews": (matthews, CORRELATION),
    "pearson": (pearson, CORRELATION),
    "spearman": (spearman, CORRELATION),
    "rmse": (rmse, ERROR),
    "mae": (mae, ERROR),
}
"""What is computed of predictions and labels, and how it is read."""


def _f1(predictions: NDArray, labels: NDArray, average: str) -> float:
    found = sklearn_metrics.f1_score(
        labels, predictions, average=average, zero_division=NO_SUCH_CLASS
    )
    return float(found)


def _error(function: Callable, predictions: NDArray, labels: NDArray) -> float:
    return float(function(labels, predictions)) if numpy.isfinite(predictions).all() else math.inf


def _correlation(function: Callable, predictions: NDArray, labels: NDArray) -> float:
    if not numpy.isfinite(predictions).all():
        return math.nan
    if numpy.ptp(predictions) == 0 or numpy.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)
