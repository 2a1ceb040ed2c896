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

from fedex_lora.recipe import Part, Recipe, TaskSpec, did_you_mean
from fedex_lora.recipe.refused import REFUSED_LORA
from fedex_lora.recipe.task import own_specs

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


def expected(field: FieldInfo) -> str:
    """The type and range of a field, in words.

    Example:
        >>> expected(Recipe.model_fields["seed"])
        'a whole number of at least 0'
    """
    bounds = [
        f"{words} {getattr(bound, name):.15g}"
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
    for name, field in Recipe.model_fields.items():
        blocks = own_specs() if field.annotation is TaskSpec else [field.annotation]
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
