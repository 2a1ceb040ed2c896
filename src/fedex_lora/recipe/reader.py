"""Recipes as flat YAML files: the only place that reads YAML.

Every problem of a file is reported at once, each with its line and, where a name is misspelt,
the nearest valid one.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.recipe import LoraSpec, Problem, Recipe, limits
from fedex_lora.recipe.wording import Keys, describe

_log = logging.getLogger(__name__)

# YAML 1.1 wants a dot in a float; people, and Python, write 1e-3.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_BLOCKS = [name for name in Recipe.model_fields if name not in ("name", "seed")]
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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: The file.
        overrides: Texts `a.b=c` that set one key each, the value written as in YAML. An override
            that names another source of data replaces the file's.

    Raises:
        UserError: If anything is wrong; one line for each problem.
    """
    return load_recipe_with_places(path, overrides)[0]


def load_stored_recipe(path: Path) -> Recipe:
    """The recipe of a run that was begun, whatever `limits` says of it now."""
    places = Places(f"{path}:1")
    raw, lines = read_yaml(path, places)
    return recipe_of(raw, places, (), lines, stored=True)


def recipe_of_text(text: str) -> Recipe:
    """The recipe that `dump_recipe` wrote."""
    return recipe_of(_Reader(text, "").read(), Places(""), stored=True)


def load_recipe_with_places(
    path: Path,
    overrides: Sequence[str] = (),
    also: Check | None = None,
    further: Check | None = None,
) -> tuple[Recipe, Places]:
    """`load_recipe`, and where each key was written.

    Args:
        also, further: As for `recipe_of`.
    """
    places = Places(f"{path}:1")
    raw, lines = read_yaml(path, places)
    if "recipes" in raw and "model" not in raw:
        text = f"a grid of runs, not a recipe; start it with `fedex-lora grid {path}`"
        raise RecipeError(f"{path}: this is {text}")
    return recipe_of(raw, places, overrides, lines, also, further), places


def recipe_of(
    raw: dict[str, Any],
    places: Places,
    overrides: Sequence[str] = (),
    lines: Sequence[str] = (),
    also: Check | None = None,
    further: Check | None = None,
    stored: bool = False,
) -> Recipe:
    """The recipe of plain values.

    Args:
        raw: As in YAML; overrides are put in.
        places: Where the values were written.
        overrides: As for `load_recipe`.
        lines: Problems that are known already.
        also: Finds more problems of a recipe; it is the one without the keys that are wrong.
        further: The same, but it takes so long that it is asked only if something is wrong.
        stored: Whether it is that of a run that was begun, which `limits` does not hold for.

    Raises:
        UserError: If anything is wrong; one line for each problem.
    """
    lines = list(lines)
    for override in overrides:
        lines += _override(raw, override, places)
    _complete(raw, places)
    recipe, problems = whole(raw)
    lines += [places.line(*problem) for problem in problems]
    wrong = {keys for keys, _ in problems}
    for check in (None if stored else limits, also, further):
        if recipe is None or check is None or (check is further and not lines):
            continue
        found = [(tuple(key.split(".")) if key else (), text) for key, text in check(recipe)]
        found = [(keys, text) for keys, text in found if keys not in wrong]
        lines += [places.line(keys, text) if keys else text for keys, text in found]
        wrong |= {keys for keys, _ in found if keys}
        recipe = whole(raw, wrong)[0] if wrong else recipe
    if lines or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(lines)))
    if METHODS[recipe.method.name].trains == "all" and recipe.lora != LoraSpec():
        text = f"{recipe.method.name} trains all parameters; this block is not used"
        _log.warning("%s", places.line(("lora",), text))
    return recipe


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


def read_yaml(path: Path, places: Places) -> tuple[dict[str, Any], list[str]]:
    """The keys and values of a YAML file, and a line for each key given twice.

    Args:
        places: Is told where each key stands.

    Raises:
        UserError: It is unreadable, no YAML, or no block of keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no such file; expected a recipe in YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: not readable as UTF-8 text: {error}") from error
    reader = _Reader(text, str(path))
    values = reader.read()
    places.known.update(reader.places)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}:1: expected a recipe: lines of `key: value`")
    return values, reader.lines


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
