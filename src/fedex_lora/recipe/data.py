"""From which rows is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedex_lora.recipe.part import LocalPath, Part, Problem, listed


class DataSpec(Part):
    """Exactly one of name (hub), path (directory), clients (a file each), source (built in)."""

    name: str | None = None
    config: str | None = None
    revision: str | None = None
    path: LocalPath | None = None
    clients: list[LocalPath] | None = (
        None  # with path: the server's evaluation rows come from there
    )
    source: Literal["stdlib-docs", "digits"] | None = None
    evaluation: dict[str, str] = Field(
        default={}
    )  # further evaluation splits: a file, or NAME[:CONFIG][@SPLIT]
    train_examples: int | None = Field(default=None, ge=1)  # a seeded sample of the training rows
    evaluation_examples: int | None = Field(default=None, ge=1)  # of each evaluation split

    def problems(self) -> Iterator[Problem]:
        given = {k for k in ("name", "path", "clients", "source") if getattr(self, k) is not None}
        if len(given) != 1 and given != {"clients", "path"}:
            got = listed(sorted(given)) or "none"
            sources = "name, path, clients, source (or clients with path)"
            yield "", f"expected exactly one of {sources}, got {got}"
        if self.clients is not None and len(set(self.clients)) < max(1, len(self.clients)):
            yield "clients", "expected one or more files, all different"
        for option in ("config", "revision"):
            if getattr(self, option) is not None and self.name is None:
                yield option, "only a data set of the hub (`name`) has one"
