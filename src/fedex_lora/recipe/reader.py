"""Recipes as flat YAML files: the only place that reads YAML.

Every problem of a file is reported at once, each with its line and, where a name is misspelt,
the nearest valid one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.disk import read_text
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.recipe import LoraSpec, Recipe, limits
from fedex_lora.recipe.draft import Draft, Keys, Places

_log = logging.getLogger(__name__)

# YAML 1.1 wants a dot in a float; people, and Python, write 1e-3.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_SOURCES = [{"name", "config", "revision"}, {"path", "clients"}, {"source"}]  # one kind at a time


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, which a flat file does not need."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not used here", problem_mark=mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number, and the line ends that PyYAML loses."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: The file.
        overrides: Texts `a.b=c` that set one key each, the value written as in YAML. An override
            that names another source of data replaces the file's.

    Raises:
        UserError: If anything is wrong; one line for each problem.
    """
    return read_draft(path, overrides).settled()


def load_stored_recipe(path: Path) -> Recipe:
    """The recipe of a run that was begun, whatever `limits` says of it now."""
    raw, places, lines = read_yaml(path)
    return drafted(raw, places, (), lines, stored=True).settled()


def recipe_of_text(text: str) -> Recipe:
    """The recipe that `dump_recipe` wrote."""
    return drafted(_Reader(text, "").read(), Places(""), stored=True).settled()


def read_draft(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """What a YAML file says, as for `load_recipe`, and what is wrong with it.

    Raises:
        UserError: It is no YAML, or no recipe at all.
    """
    raw, places, lines = read_yaml(path)
    if "recipes" in raw and "model" not in raw:
        text = f"a grid of runs, not a recipe; start it with `fedex-lora grid {path}`"
        raise RecipeError(f"{path}: this is {text}")
    return drafted(raw, places, overrides, lines)


def drafted(
    raw: dict[str, Any],
    places: Places,
    overrides: Sequence[str] = (),
    lines: Sequence[str] = (),
    stored: bool = False,
) -> Draft:
    """The recipe of plain values, and what is wrong with it.

    Args:
        raw: As in YAML; overrides are put in.
        places: Where the values were written.
        overrides: As for `load_recipe`.
        lines: Problems that are known already.
        stored: Whether it is that of a run that was begun, which `limits` does not hold for.
    """
    wrong = [line for text in overrides for line in _override(raw, text, places)]
    draft = Draft.of(raw, places, (*lines, *wrong))
    if not stored:
        draft = draft.checked(limits)
    recipe = draft.recipe
    if recipe and METHODS[recipe.method.name].trains == "all" and recipe.lora != LoraSpec():
        text = f"{recipe.method.name} trains all parameters; this block is not used"
        _log.warning("%s", places.line(("lora",), text))
    return draft


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting, defaults included, that loads back to an equal recipe."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["training"] = recipe.training  # none of its own None's is left out
    if recipe.data.clients is not None:
        del values["federation"]["partition"]  # not used, and refused if written
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_SETTLED = ("engine.precision", "engine.fuse")


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The settings in which two recipes differ, e.g. `lora.r: 4 != 8`.

    What a run settles for itself ("auto") differs from no choice.
    """
    ours, theirs = (dict(leaves(r.model_dump(mode="json"))) for r in (a, b))
    return [
        f"{key}: {ours.get(key, 'not set')} != {theirs.get(key, 'not set')}"
        for key in ours | theirs
        if key not in ours or key not in theirs or ours[key] != theirs[key]
        if key not in _SETTLED or "auto" not in (ours[key], theirs[key])
    ]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested blocks."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_yaml(path: Path) -> tuple[dict[str, Any], Places, list[str]]:
    """The keys and values of a YAML file, where they stand, and a line for each key given twice.

    Raises:
        UserError: It is unreadable, no YAML, or no block of keys.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no such file; expected a recipe in YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: not readable as UTF-8 text: {error}") from error
    reader = _Reader(text, str(path))
    values = reader.read()
    if not isinstance(values, dict):
        raise RecipeError(f"{path}:1: expected a recipe: lines of `key: value`")
    return values, Places(f"{path}:1", reader.places), reader.lines


class _Reader:
    """One YAML text as plain values, with the place of every key and the keys given twice."""

    def __init__(self, text: str, source: str, lined: bool = True) -> None:
        self.text, self.source, self.lined = text, source, lined
        self.places: dict[Keys, str] = {}
        self.lines: list[str] = []

    def read(self) -> Any:
        """The values, or a `UserError` with the line where the text is no YAML."""
        try:
            self.loader = _Loader(self.text)
            node = self.loader.get_single_node()
            return None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            raise RecipeError(f"{self._place(mark)}: not valid YAML: {error.problem}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"{self.source}: not valid YAML: {error}") from error

    def _place(self, mark: yaml.Mark | None) -> str:
        return f"{self.source}:{mark.line + 1}" if self.lined and mark else self.source

    def _value(self, node: yaml.Node, keys: Keys) -> Any:
        self.places.setdefault(keys, self._place(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._value(item, (*keys, i)) for i, item in enumerate(node.value)]
        return self.loader.construct_document(node)

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            # A key is the text as written: `no` and `1` are names like any other.
            inner = (*keys, key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
            if inner[-1] in values:
                name, first = ".".join(map(str, inner)), self.places[inner]
                place = self._place(key_node.start_mark)
                self.lines.append(f"{place}: {name}: given twice; the first is at {first}")
                continue
            self.places[inner] = self._place(key_node.start_mark)
            values[inner[-1]] = self._value(value_node, inner)
        return values


def _override(raw: dict[str, Any], override: str, places: Places) -> list[str]:
    """Set one key of `raw`; the lines say what is wrong with the override."""
    place = f"`set={override}`"
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        return [f"{place}: expected KEY=VALUE, e.g. federation.rounds=3"]
    reader, block = _Reader(text, place, lined=False), raw
    try:
        value = reader.read()
    except RecipeError as error:
        return [str(error)]
    _drop_other_sources(raw, keys, places)
    for i, key in enumerate(keys[:-1], start=1):
        if block.get(key) is None:
            block[key] = {}
            places.known[keys[:i]] = place
        block = block[key]
        if not isinstance(block, dict):
            return [f"{place}: {'.'.join(keys[:i])} is a value, not a block of keys"]
    block[keys[-1]] = value
    places.known = {k: v for k, v in places.known.items() if k[: len(keys)] != keys}
    places.known[keys] = place
    return reader.lines


def _drop_other_sources(raw: dict[str, Any], keys: Keys, places: Places) -> None:
    data = raw.get("data")
    if len(keys) != 2 or keys[0] != "data" or not isinstance(data, dict):
        return
    for kind in _SOURCES:
        if keys[1] in kind:
            others = set().union(*_SOURCES) - kind
            for key in others & data.keys():
                if not places.of(("data", key)).startswith("`set="):
                    del data[key]
