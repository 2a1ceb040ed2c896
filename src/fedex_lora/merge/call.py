"""Merging adapters as one call from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import Merged, Options, merge_adapters


@dataclass(frozen=True)
class Merge:
    """The exact weighted mean of PEFT adapters' updates; nothing is read before `save`.

    Attributes:
        adapters: Folders, or hub ids.
        weights: Relative to each other; None for equal ones.
        options: Further ones of `make_plan` and of `merge.write.Options`, e.g. `strict`, `rank`.
    """

    adapters: Sequence[str | Path]
    weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Merged:
        """Writes the merged adapter; returns what was written, with its errors and notes.

        Raises:
            UserError: The adapters do not go together, by name; `path` is in use.
        """
        options = dict(self.options)
        written = {k: options.pop(k) for k in Options.__dataclass_fields__ if k in options}
        strict = options.pop("strict", True)
        opened = [open_adapter(str(name)) for name in self.adapters]
        plan = make_plan(opened, self.weights, strict, **options)
        return merge_adapters(plan, Path(path), Options(**written))
