"""Tables to which other packages add rows: by a call, or by an entry point."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fedex_lora.errors import UserError

Row = TypeVar("Row")


OURS = "fedex-lora"


class Registry(UserDict[str, Row]):
    """Rows by name: this package's own, and those of others, imported when they are asked for.

    Args:
        what: What a row is, in errors.
        group: Of the entry points by which packages add rows.
        own: This package's rows.
        check: Raises a `UserError` for what is no row; called with the name and it.
        same: Whether a second row of a name is the first again: a module that was run twice.
    """

    def __init__(
        self,
        what: str,
        group: str,
        own: Mapping[str, Row],
        check: Callable[[str, Row], None],
        same: Callable[[Row, Row], bool],
    ) -> None:
        super().__init__(own)
        self._what, self._group, self._check, self._same = what, group, check, same
        self._by = dict.fromkeys(own, OURS)

    def register(self, name: str, row: Row, by: str) -> None:
        """Adds a row.

        Args:
            by: The module it comes from.

        Raises:
            UserError: It is none, or there is another of that name.
        """
        self._check(name, row)
        for point in points(self._group).get(name, []):
            if point.module.partition(".")[0] != by.partition(".")[0]:
                raise twice(self._what, name, who(point), by)
        if name in self.data and not self._same(self.data[name], row):
            raise twice(self._what, name, self._by[name], by)
        self.data[name], self._by[name] = row, by

    def added_by(self, name: str) -> str | None:
        """The package or module that added a row; None of this package's own."""
        by = self._by.get(name, OURS)
        return None if by == OURS else by

    def one(self, name: str) -> Row:
        """The row of that name, if nobody else has one of it.

        Raises:
            KeyError: There is none.
            UserError: There are two, or it cannot be imported.
        """
        found = points(self._group).get(name, [])
        if self._by.get(name) == OURS or len(found) > 1:
            names = [*([OURS] if self._by.get(name) == OURS else []), *map(who, found)]
            if len(names) > 1:
                raise twice(self._what, name, *names)
        return self[name]

    def __missing__(self, name: str) -> Row:
        if name not in points(self._group):
            raise KeyError(name)
        point = points(self._group)[name][0]
        row = loaded(self._what, point)
        self._check(name, row)
        if name in self.data and not self._same(self.data[name], row):  # by a call, on import
            raise twice(self._what, name, self._by[name], who(point))
        self.data[name], self._by[name] = row, who(point)
        return row

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in points(self._group)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.data, *(n for n in points(self._group) if n not in self.data)])

    def __len__(self) -> int:
        return len({*self.data, *points(self._group)})


@cache
def points(group: str) -> Mapping[str, list[EntryPoint]]:
    """The entry points of a group by name; none is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def who(point: EntryPoint) -> str:
    """Whose it is, for errors."""
    return f"{point.dist.name if point.dist else 'a package'} ({point.value})"


def loaded(what: str, point: EntryPoint) -> Any:
    """What an entry point names, imported."""
    try:
        return point.load()
    except UserError:
        raise
    except Exception as error:  # whatever a module of others does when it is run
        told = f"{what} {point.name!r}: {who(point)} cannot be imported"
        raise UserError(f"{told}: {type(error).__name__}: {error}") from error


def twice(what: str, name: str, *by: str) -> UserError:
    """The error of a name that two have."""
    told = f"{what} {name!r}: registered twice, by {' and '.join(by)}"
    return UserError(f"{told}; rename one of them, or uninstall its package")
