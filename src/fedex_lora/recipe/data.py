"""From which rows is learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedex_lora.recipe.part import LocalPath, Part, Problem


def several(given: Path | list[Path]) -> list[Path]:
    """One file, or several."""
    return given if isinstance(given, list) else [given]


def name_of(file: Path) -> str:
    """What a file calls its client or split: its name without suffixes.

    Example:
        >>> name_of(Path("data/ann.csv")), name_of(Path("data/ann.csv.gz"))
        ('ann', 'ann')
    """
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


class DataSpec(Part):
    """Exactly one of name (hub), path (directory), clients (files of each), source (built in)."""

    name: str | None = None
    config: str | None = None
    revision: str | None = None
    path: LocalPath | None = None
    # a file each, named as the client; or by name, a file or pattern, or several; with path: the
    # server's evaluation rows come from there
    clients: list[LocalPath] | dict[str, LocalPath | list[LocalPath]] | None = None
    # by client: its own rows to be scored on, in place of a share of its training rows
    validation: dict[str, LocalPath | list[LocalPath]] = Field(default={})
    source: Literal["stdlib-docs", "digits"] | None = None
    evaluation: dict[str, str] = Field(
        default={}
    )  # further evaluation splits: a file, or NAME[:CONFIG][@SPLIT]
    # false: rows of files, and what they become, are on disk, some at a time in memory
    keep_in_memory: bool = True
    train_examples: int | None = Field(default=None, ge=1)  # a seeded sample of the training rows
    evaluation_examples: int | None = Field(default=None, ge=1)  # of each evaluation split

    @property
    def on_disk(self) -> bool:
        """Whether rows of files are mapped into memory from disk."""
        return not self.keep_in_memory

    def files(self) -> list[tuple[str, list[Path]]]:
        """The clients' names and their files, in the order given; none without `clients`."""
        if isinstance(self.clients, dict):
            return [(name, several(given)) for name, given in self.clients.items()]
        return [(name_of(file), [file]) for file in self.clients or []]

    def problems(self) -> Iterator[Problem]:
        given = {k for k in ("name", "path", "clients", "source") if getattr(self, k) is not None}
        if len(given) != 1 and given != {"clients", "path"}:
            got = ", ".join(sorted(given)) or "none"
            sources = "name, path, clients, source (or clients with path)"
            yield "", f"expected exactly one of {sources}, got {got}"
        if self.clients is not None:
            files = [file for _, each in self.files() for file in each]
            if len(set(files)) < max(1, len(files)) or not all(each for _, each in self.files()):
                yield "clients", "expected one or more files, all different"
        for option in ("config", "revision"):
            if getattr(self, option) is not None and self.name is None:
                yield option, "only a data set of the hub (`name`) has one"
