"""Handwritten digits: the 1,797 images of 8 × 8 pixels that scikit-learn brings along.

They are the test set of the UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, doi 10.24432/C50P49), in its order.
"""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits

LABELS: tuple[str, ...] = tuple("0123456789")
"""The names of the classes, in the order of their numbers."""

HELD_OUT = 30  # of each class, for validation and again for test
WHITE = 16  # the brightest of the pixels' 17 values


def digits() -> dict[str, Dataset]:
    """Grey images (column `image`) with their digits (`label`): 1,197 / 300 / 300 rows.

    The split is the same for every run, without chance: of each digit the last 30 images are for
    the test and the 30 before them for validation. Rows keep their order.

    Example:
        >>> {split: len(rows) for split, rows in digits().items()}
        {'train': 1197, 'validation': 300, 'test': 300}
    """
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / WHITE)).astype(np.uint8)
    from_end = _from_end(labels)
    parts = {
        "train": from_end >= 2 * HELD_OUT,
        "validation": (from_end >= HELD_OUT) & (from_end < 2 * HELD_OUT),
        "test": from_end < HELD_OUT,
    }
    features = Features({"image": Image(), "label": ClassLabel(names=list(LABELS))})
    return {
        split: Dataset.from_dict(
            {"image": list(grey[part]), "label": labels[part].tolist()}, features=features
        )
        for split, part in parts.items()
    }


def _from_end(labels: np.ndarray) -> np.ndarray:
    """How many rows of its class come after each row."""
    left = np.empty_like(labels)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        left[rows] = np.arange(len(rows))[::-1]
    return left
