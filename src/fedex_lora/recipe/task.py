"""What is learned: the block `task`, whose keys are those of its kind.

A kind of task is a file of its own, which defines the block and what follows from it and calls
`register_task`. It is found in the folder `fedex_lora/tasks/kinds` or by an entry point of the
group `fedex_lora.tasks`, and is imported when a recipe asks for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from fedex_lora.aggregation.registry import OURS, loaded, points, twice, who
from fedex_lora.errors import UserError
from fedex_lora.recipe.part import Part, Problem, did_you_mean, fault

GROUP = "fedex_lora.tasks"  # of entry points
_HOME = "fedex_lora.tasks.kinds"


class TaskSpec(Part):
    """What all kinds of tasks have in their block; each adds its own keys and `build`.

    Attributes:
        vocabulary: Whether its model has logits for every word of the vocabulary, which take most
            of the memory that training takes.
        scored: What its block has beyond the defaults where a model is only scored.
        forms: Where its rows may have one of several forms, the keys of the columns of each.
    """

    vocabulary: ClassVar[bool] = True
    scored: ClassVar[Mapping[str, Any]] = {}
    forms: ClassVar[tuple[tuple[str, ...], ...]] = ()

    kind: str
    max_length: int = Field(default=128, ge=4)
    evaluation_max_length: int | None = Field(default=None, ge=4)  # max_length if not given
    columns: dict[str, str] = Field(default={})  # the task's name of a column: the rows' own name

    def build(self, labels: Sequence[str] | None) -> Any:
        """The `fedex_lora.tasks.Task` that the block asks for.

        Args:
            labels: The classes of data that bring their own.
        """
        raise NotImplementedError

    def renamable(self) -> Sequence[str]:
        """What `columns` may name; none where it is not used."""
        return ()

    @property
    def title(self) -> str:
        """The data set that it is named after, or its kind."""
        return getattr(self, "name", None) or self.kind

    @property
    def evaluated_length(self) -> int:
        """The `max_length` of rows that models are scored on."""
        return self.evaluation_max_length or self.max_length

    @property
    def generates(self) -> bool:
        """Whether texts are generated when models are scored."""
        return bool(getattr(self, "generate", False))

    @property
    def lacks_labels(self) -> bool:
        """Whether it needs classes and names none, so that the data have to bring their own."""
        return False

    def problems(self) -> Iterator[Problem]:
        known = self.renamable()
        if self.columns and not known:
            yield "columns", f"a task of kind {self.kind} does not use it"
            return
        for column in self.columns:
            if column not in known:
                near = did_you_mean(column, known)
                yield f"columns.{column}", f"expected one of {', '.join(known)}{near}"
        if len(set(self.columns.values())) < len(self.columns):
            yield "columns", "two of them name the same column"


_registered: dict[str, type[TaskSpec]] = {}


def register_task(kind: str, spec: type[TaskSpec]) -> None:
    """Makes a kind of task known to recipes of this process.

    Args:
        kind: What recipes call it.
        spec: Its block, with `build`.

    Raises:
        UserError: There is a task of that kind already, or `spec` is none.
    """
    for point in points(GROUP).get(kind, []) if kind not in _built_in() else []:
        module = getattr(spec, "__module__", "")
        if module.partition(".")[0] != point.module.partition(".")[0]:
            raise twice("task", kind, who(point), module)
    _register(kind, spec)


def _register(kind: str, spec: type[TaskSpec]) -> None:
    if not (isinstance(spec, type) and issubclass(spec, TaskSpec)):
        raise UserError(f"task {kind!r}: {spec!r} is no TaskSpec; expected a subclass of it")
    if spec.build is TaskSpec.build:
        raise UserError(
            f"task {kind!r}: {spec.__name__} lacks `build(self, labels)`, which gives its Task"
        )
    known = _registered.get(kind)
    first = known.__module__ if known else _built_in().get(kind, spec.__module__)
    if first != spec.__module__ or (known and known.__qualname__ != spec.__qualname__):
        raise twice("task", kind, first, spec.__module__)
    _registered[kind] = spec


def task_kinds() -> tuple[str, ...]:
    """All kinds that recipes may name; none is imported."""
    return tuple(sorted({*_registered, *_built_in(), *points(GROUP)}))


def built_in_kinds() -> tuple[str, ...]:
    """The kinds of this package."""
    return tuple(_built_in())


def spec_of(kind: str) -> type[TaskSpec] | None:
    """The block of a kind, imported if need be; None if there is no such kind.

    Raises:
        UserError: Two packages have one, or it cannot be imported, or is no task.
    """
    found = points(GROUP).get(kind, [])
    names = [*([OURS] if kind in _built_in() else []), *map(who, found)]
    if len(names) > 1:
        raise twice("task", kind, *names)
    if kind not in _registered and kind in _built_in():
        import_module(_built_in()[kind])
    elif kind not in _registered and found:
        _register(kind, loaded("task", found[0]))
    return _registered.get(kind)


def own_specs() -> list[type[TaskSpec]]:
    """The blocks of this package's kinds and of those that were registered by a call."""
    for module in _built_in().values():
        import_module(module)
    return list(_registered.values())


def task_spec(**values: Any) -> TaskSpec:
    """The block of plain values, checked.

    Raises:
        pydantic.ValidationError: Something is wrong with them.

    Example:
        >>> task_spec(kind="glue", name="sst2").title
        'sst2'
    """
    return _Whole.model_validate({"task": values}).task


@cache
def _built_in() -> Mapping[str, str]:
    """The kinds of this package and their modules, by the names of files alone."""
    home = importlib.util.find_spec(_HOME)
    folders = home.submodule_search_locations or [] if home else []
    names = sorted(file.stem for folder in folders for file in Path(folder).glob("[a-z]*.py"))
    return {name.replace("_", "-"): f"{_HOME}.{name}" for name in names}


_EARLIER: Mapping[str, Any] = {  # what recipes once said for tasks of all kinds
    **dict.fromkeys(("name", "labels", "text_column", "text_pair_column", "image_column")),
    **dict.fromkeys(("prompt", "response")),
    "label_column": "label",
    "max_new_tokens": 64,
    "generate": False,
    "num_beams": 10,
    "compare": "latex",
    "score": "generation",
}


def _read(value: Any) -> Any:
    """The block of a kind, from plain values."""
    if not isinstance(value, Mapping):
        return value
    kind, kinds = value.get("kind"), ", ".join(task_kinds())
    if "kind" not in value:
        raise fault([("kind", f"missing; expected one of {kinds}")])
    try:
        spec = spec_of(kind) if isinstance(kind, str) else None
    except UserError as error:
        raise fault([("kind", str(error))]) from error
    if spec is None:
        near = did_you_mean(kind, task_kinds())
        raise fault([("kind", f"expected one of {kinds}, got {kind!r}{near}")])
    own = spec.model_fields
    rest = {
        k: v
        for k, v in value.items()
        if k not in _EARLIER or (v is not None if k in own else v != _EARLIER[k])
    }
    try:
        return spec.model_validate(rest)
    except ValidationError as error:
        context = {"text": str(error), "error": error, "spec": spec}
        raise PydanticCustomError("task", "{text}", context) from None


TaskBlock = Annotated[SerializeAsAny[TaskSpec], BeforeValidator(_read)]


class _Whole(Part):
    task: TaskBlock
