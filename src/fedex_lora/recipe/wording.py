"""Types and ranges of a recipe's keys, in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

_ONE = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers", Path: "paths"}
_BOUNDS = [("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")]


def expected(field: FieldInfo) -> str:
    """The type and range of a field, in words.

    Example:
        >>> from fedex_lora.recipe import Recipe
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
