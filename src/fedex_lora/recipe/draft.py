"""A recipe as it was written, and all that is wrong with it, in plain words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedex_lora.errors import RecipeError, did_you_mean
from fedex_lora.recipe.part import Part, Problem
from fedex_lora.recipe.refused import REFUSED_LORA
from fedex_lora.recipe.task import TaskSpec, own_specs
from fedex_lora.recipe.whole import Recipe
from fedex_lora.recipe.wording import expected

Keys = tuple[str | int, ...]
_Part = TypeVar("_Part", bound=Part)

_BLOCKS = [name for name in Recipe.model_fields if name not in ("name", "seed")]

Check = Callable[[Recipe], Iterable[Problem]]  # (dotted key, or "" for none, what is wrong)


@dataclass
class Places:
    """Where each key of a recipe was written: `FILE:LINE`, or the `--set` that gave it."""

    root: str
    known: dict[Keys, str] = field(default_factory=dict)

    def of(self, keys: Keys) -> str:
        """The place of the nearest enclosing key that was written."""
        while keys and keys not in self.known:
            keys = keys[:-1]
        return self.known.get(keys, self.root)

    def line(self, keys: Keys, text: str) -> str:
        """One line of an error message."""
        return ": ".join(filter(None, (self.of(keys), ".".join(map(str, keys)), text)))


@dataclass(frozen=True)
class Draft:
    """A recipe as it was written, and what is known to be wrong with it.

    Attributes:
        raw: Its values, as in YAML.
        places: Where they were written.
        recipe: Made of those that are not wrong; None if nothing can be made of them.
        lines: What is wrong, with its place.
        wrong: The keys of values that are.
    """

    raw: Mapping[str, Any]
    places: Places
    recipe: Recipe | None
    lines: tuple[str, ...] = ()
    wrong: frozenset[Keys] = frozenset()

    @classmethod
    def of(cls, raw: dict[str, Any], places: Places, lines: Sequence[str] = ()) -> Draft:
        """Of plain values.

        Args:
            raw: As in YAML; what goes without saying is put in.
            lines: Problems that are known already.
        """
        _complete(raw, places)
        recipe, problems = whole(raw)
        told = (places.line(*problem) for problem in problems)
        return cls(raw, places, recipe, (*lines, *told), frozenset(keys for keys, _ in problems))

    def checked(self, check: Check) -> Draft:
        """With what a check finds of the values that are not known to be wrong."""
        if self.recipe is None:
            return self
        found = [(tuple(key.split(".")) if key else (), text) for key, text in check(self.recipe)]
        found = [(keys, text) for keys, text in found if keys not in self.wrong]
        lines = [self.places.line(keys, text) if keys else text for keys, text in found]
        wrong = self.wrong | {keys for keys, _ in found if keys}
        recipe = self.recipe if wrong == self.wrong else whole(self.raw, wrong)[0]
        return Draft(self.raw, self.places, recipe, (*self.lines, *lines), wrong)

    def settled(self) -> Recipe:
        """The recipe.

        Raises:
            UserError: If anything is wrong; one line for each problem.
        """
        if self.lines or self.recipe is None:
            raise RecipeError("\n".join(dict.fromkeys(self.lines)))
        return self.recipe


def whole(
    raw: Mapping[str, Any], wrong: Iterable[Keys] = ()
) -> tuple[Recipe | None, list[tuple[Keys, str]]]:
    """The recipe of plain values without those that are wrong, so that the rest can be checked too.

    Args:
        wrong: Keys that are known to be wrong.

    Returns:
        None if nothing can be made of the rest; and all problems that were found on the way.
    """
    known, problems = set(wrong), []
    while True:
        rest = _without(raw, known)
        try:
            return Recipe.model_validate(rest), problems
        except ValidationError as error:
            found = list(describe(error, rest))
        # what is said of a block without its wrong keys may be due to that
        blocks = {keys[:n] for keys in known for n in range(len(keys) + 1)}
        found = [(keys, text) for keys, text in found if keys not in blocks]
        if not found:
            return None, problems
        problems += found
        known |= {keys for keys, _ in found}


def _without(raw: Mapping[str, Any], wrong: Iterable[Keys]) -> dict[str, Any]:
    rest = copy.deepcopy(dict(raw))
    for keys in wrong:
        block: Any = rest
        for key in keys[:-1]:
            block = block.get(key) if isinstance(block, dict) else None
        if keys and isinstance(block, dict):
            block.pop(keys[-1], None)
    _complete(rest, Places(""))
    return rest


def _complete(raw: dict[str, Any], places: Places) -> None:
    for key in _BLOCKS:
        if key in raw and raw[key] is None:  # a block whose every line is commented out
            raw[key] = {}
    data, federation = raw.get("data"), raw.setdefault("federation", {})
    files = data.get("clients") if isinstance(data, dict) else None
    if (
        isinstance(files, list | dict)
        and isinstance(federation, dict)
        and "clients" not in federation
    ):
        federation["clients"] = len(files)
        places.known["federation", "clients"] = places.of(("data", "clients"))


def describe(
    error: ValidationError, raw: Mapping[str, Any], root: type[Part] = Recipe
) -> Iterator[tuple[Keys, str]]:
    """Where and what is wrong, for every problem that validation found.

    Args:
        error: Of `root.model_validate(raw)`.
        raw: The values that were validated.
        root: The recipe, or a task's block.
    """
    for detail in error.errors(include_url=False):
        keys, context = detail["loc"], detail.get("ctx", {})
        if detail["type"] == "fields":
            for path, what in context["found"]:
                yield (*keys, *filter(None, path.split("."))), what
        elif detail["type"] == "task":
            for inner, what in describe(context["error"], raw["task"], context["spec"]):
                yield (*keys, *inner), what
        elif detail["type"] == "extra_forbidden":
            yield keys, _unknown(keys, raw, root)
        else:
            yield _wrong(detail, raw, root)


def part_of(kind: type[_Part], raw: Mapping[str, Any], name: str) -> _Part:
    """A block of values that Python code gives.

    Args:
        name: What they are the fields of, for errors.

    Raises:
        UserError: What is wrong with each of them.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        found = [(name, *map(str, keys), what) for keys, what in describe(error, raw, kind)]
    raise RecipeError("\n".join(f"{'.'.join(keys)}: {what}" for *keys, what in found))


def _field(keys: Keys, root: type[Part]) -> tuple[Keys, FieldInfo | None, type[Part]]:
    """The field that keys lead to, leaving out what pydantic appends for members of unions."""
    block: type[Part] | None = root
    found, field, within = 0, None, root
    while block and found < len(keys) and (key := str(keys[found])) in block.model_fields:
        within, field = block, block.model_fields[key]
        kinds = get_args(field.annotation) or (field.annotation,)  # a block, or none
        block = next((k for k in kinds if isinstance(k, type) and issubclass(k, Part)), None)
        found += 1
    return keys[:found], field, block or within


def _unknown(keys: Keys, raw: Mapping[str, Any], root: type[Part]) -> str:
    key = str(keys[-1])
    if keys[0] == "lora" and key in REFUSED_LORA:
        return f"refused: {REFUSED_LORA[key]}"
    block = _field(keys, root)[2]
    if issubclass(root, TaskSpec) and any(key in s.model_fields for s in own_specs()):
        return f"a task of kind {raw['kind']} does not use it"
    elsewhere = f"; did you mean '{_home(key)}'?" if _home(key) else ""
    near = did_you_mean(key, block.model_fields)
    return "unknown key" + (elsewhere or near or f"; known: {', '.join(block.model_fields)}")


def _home(key: str) -> str:
    """The block in which a key of that name is at home, with the key; "" if there is none."""
    for name, holder in Recipe.model_fields.items():
        blocks = own_specs() if holder.annotation is TaskSpec else [holder.annotation]
        for block in blocks:
            if isinstance(block, type) and issubclass(block, Part) and key in block.model_fields:
                return f"{name}.{key}"
    return ""


def _wrong(detail: ErrorDetails, raw: Mapping[str, Any], root: type[Part]) -> tuple[Keys, str]:
    keys, field, _ = _field(detail["loc"], root)
    assert field is not None, detail
    if detail["type"] == "missing" and issubclass(root, TaskSpec):
        return keys, f"missing; a task of kind {raw['kind']} needs it"
    if detail["type"] == "missing":
        return keys, f"missing; expected {expected(field)}"
    got: Any = raw
    for key in keys:
        got = got[key]
    text = f"expected {expected(field)}, got {json.dumps(got, default=str)[:80]}"
    if keys[0] == "lora" and keys[-1] in REFUSED_LORA:
        return keys, f"{text}; {REFUSED_LORA[str(keys[-1])]}"
    items = got if isinstance(got, list) else [got]
    if "text" in text and any(isinstance(item, bool | int | float | date) for item in items):
        text += "; quote it if text is meant"
    if isinstance(got, str):
        text += did_you_mean(got, [v for v in _literals(field.annotation) if isinstance(v, str)])
    return keys, text


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _literals(part)
