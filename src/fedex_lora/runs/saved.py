"""What the JSON files of a run hold. What a hand or a disk made of them is named by file and place.

Keys that are not listed here are kept as they are: later versions may add some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedex_lora.errors import StorageError

Scores = dict[str, dict[str, float | None]]  # by split, or by client


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Seconds(_Part):
    round: float


class Trained(_Part):
    """What a client's turn came to."""

    loss: float | None = None
    examples: int | None = None


class Spent(_Part):
    """What was spent of a privacy budget by the end of a round."""

    level: str
    delta: float
    epsilon: dict[str, float]
    private: bool | str
    budget: float | None = None
    steps: dict[str, list[list[float]]] = {}


class Record(_Part):
    """A line of metrics.jsonl."""

    round: int
    clients: dict[str, Trained] = {}
    bytes_up: dict[str, int] = {}
    bytes_down: dict[str, int] = {}
    seconds: _Seconds | None = None
    score: float | None = None
    scores: Scores = {}
    client_scores: Scores = {}
    scored_by: list[str] = []
    weights: dict[str, float] = {}
    deviation: float | None = None
    privacy: Spent | None = None


class Scored(_Part):
    """The scores of one round's model."""

    scores: Scores
    score: float | None = None
    client_scores: Scores = {}


class Results(_Part):
    """results.json, and what comparison.json has of a run."""

    seed: int
    metric: str
    best: Scored
    last: Scored | None = None
    rounds: int | None = None
    best_round: int | None = None
    deviation: float | None
    bytes_up: int
    bytes_down: int
    seconds: float


class Saved(_Part):
    """What a run's checkpoint holds beside the state."""

    record: Record
    clients: list[str]
    recipe: str | None = None


class Evaluated(_Part):
    """scores.json of an evaluation."""

    scores: Scores
    rows: dict[str, int]


class Sources(_Part):
    """sources.json: digests, of rows by use and name."""

    weights: str
    tokenizer: str
    rows: dict[str, str]
    changes: list[dict[str, Any]] = []


WHOLE = ("clients", "bytes_up", "bytes_down", "seconds")  # of a record: what totals are made of
ENDS = ("last", "rounds", "best_round")  # of results: what a finished run is told by
COMPARISON = TypeAdapter(dict[str, list[Results]])
EXTENSIONS = TypeAdapter(list[dict[str, int]])
MAPPING = TypeAdapter(dict[str, Any])
RECORD, RESULTS = TypeAdapter(Record), TypeAdapter(Results)
SAVED, EVALUATED = TypeAdapter(Saved), TypeAdapter(Evaluated)
SOURCES = TypeAdapter(Sources)


def checked(
    kind: TypeAdapter[Any], value: Any, where: str | Path, remedy: str, needed: Sequence[str] = ()
) -> Any:
    """The value, if it is of that kind and has the needed keys as well.

    Args:
        where: The file, perhaps with the line.
        remedy: What to do about it.

    Raises:
        UserError: It is not; the first place where it is not is named.
    """
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = "".join(f"{part}: " for part in first["loc"])
        raise StorageError(f"{where}: damaged ({at}{first['msg']}); {remedy}") from None
    if missing := [name for name in needed if value.get(name) is None]:
        raise StorageError(f"{where}: damaged ({missing[0]}: missing); {remedy}")
    return value
