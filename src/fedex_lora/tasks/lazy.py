"""Libraries that take seconds to import, loaded when something of them is first used.

So a recipe is read, checked and refused without them.

Example:
    >>> torch.ones(2).tolist()
    [1.0, 1.0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


class Late:
    """A module, or what it has under `name`, as long as only attributes of it are asked for."""

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name

    def __getattr__(self, attribute: str) -> Any:
        found = import_module(self._module)
        return getattr(getattr(found, self._name) if self._name else found, attribute)


if TYPE_CHECKING:
    import datasets
    import jinja2
    import numpy
    import torch
    import transformers
    from datasets import Dataset
    from scipy import stats
    from sklearn import metrics as sklearn_metrics
    from torch import Tensor, nn
    from torch.nn import functional
    from transformers import PreTrainedTokenizerBase
else:
    datasets, jinja2, numpy = Late("datasets"), Late("jinja2"), Late("numpy")
    torch, transformers = Late("torch"), Late("transformers")
    nn, functional = Late("torch.nn"), Late("torch.nn.functional")
    stats, sklearn_metrics = Late("scipy.stats"), Late("sklearn.metrics")
    Dataset = Late("datasets", "Dataset")
    Tensor = PreTrainedTokenizerBase = Late("torch")  # names of types

__all__ = [
    "Dataset",
    "Late",
    "PreTrainedTokenizerBase",
    "Tensor",
    "datasets",
    "functional",
    "jinja2",
    "nn",
    "numpy",
    "sklearn_metrics",
    "stats",
    "torch",
    "transformers",
]
