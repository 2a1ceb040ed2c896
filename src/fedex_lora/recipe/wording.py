"""What pydantic says about a recipe, in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedex_lora.recipe import Part, Recipe, did_you_mean
from fedex_lora.recipe.refused import REFUSED_LORA

Keys = tuple[str | int, ...]

_ONE = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers", Path: "paths"}
_BOUNDS = [("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")]


def describe(error: ValidationError, raw: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Where and what is wrong, for every problem that validation found.

    Args:
        error: Of `Recipe.model_validate(raw)`.
        raw: The values that were validated.
    """
    for detail in error.errors(include_url=False):
        keys = detail["loc"]
        if detail["type"] == "fields":
            for path, what in detail.get("ctx", {})["found"]:
                yield (*keys, *filter(None, path.split("."))), what
        elif detail["type"] == "extra_forbidden":
            yield keys, _unknown(keys)
        else:
            yield _wrong(detail, raw)


def expected(field: FieldInfo) -> str:
    """The type and range of a field, in words.

    Example:
        >>> expected(Recipe.model_fields["seed"])
        'a whole number of at least 0'
    """
    bounds = [
        f"{words} {getattr(bound, name):g}"
        for bound in field.metadata
        if isinstance(bound, annotated_types.BaseMetadata)
        for name, words in _BOUNDS
        if hasattr(bound, name)
    ]
    of = " of " if bounds and bounds[0].startswith("at") else " "
    return in_words(field.annotation) + (of + " and ".join(bounds) if bounds else "")


def in_words(annotation: Any) -> str:
    """A type, in words.

    Example:
        >>> in_words(float | None), in_words(list[str])
        ('a number', 'a list of texts')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(in_words(part) for part in inner if part is not type(None))
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in inner)
    if origin is list:
        return f"a list of {_MANY.get(_plain(inner[0]), 'values')}"
    if origin is dict:
        return f"a block of {_MANY.get(_plain(inner[1]), 'keys')}"
    return _ONE.get(annotation, "a block of keys")


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _field(keys: Keys) -> tuple[Keys, FieldInfo | None, type[Part]]:
    """The field that keys lead to, leaving out what pydantic appends for members of unions."""
    block: type[Part] | None = Recipe
    found, field, within = 0, None, Recipe
    while block and found < len(keys) and (key := str(keys[found])) in block.model_fields:
        within, field = block, block.model_fields[key]
        kind = field.annotation
        block = kind if isinstance(kind, type) and issubclass(kind, Part) else None
        found += 1
    return keys[:found], field, block or within


def _unknown(keys: Keys) -> str:
    key = str(keys[-1])
    if keys[0] == "lora" and key in REFUSED_LORA:
        return f"refused: {REFUSED_LORA[key]}"
    block = _field(keys)[2]
    elsewhere = f"; did you mean '{_home(key)}'?" if _home(key) else ""
    near = did_you_mean(key, block.model_fields)
    return "unknown key" + (elsewhere or near or f"; known: {', '.join(block.model_fields)}")


def _home(key: str) -> str:
    """The block in which a key of that name is at home, with the key; "" if there is none."""
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part) and key in kind.model_fields:
            return f"{name}.{key}"
    return ""


def _wrong(detail: ErrorDetails, raw: Mapping[str, Any]) -> tuple[Keys, str]:
    keys, field, _ = _field(detail["loc"])
    assert field is not None, detail
    if detail["type"] == "missing":
        return keys, f"missing; expected {expected(field)}"
    got: Any = raw
    for key in keys:
        got = got[key]
    text = f"expected {expected(field)}, got {json.dumps(got, default=str)[:80]}"
    if keys[0] == "lora" and keys[-1] in REFUSED_LORA:
        return keys, f"{text}; {REFUSED_LORA[str(keys[-1])]}"
    items = got if isinstance(got, list) else [got]
    if "text" in text and any(isinstance(item, bool | int | float) for item in items):
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
