"""The folder that a client gets for a round.

turn.json                whose turn it is, of which run and round; digests of the files below
turn.json.sig            the coordinator's ed25519 signature of turn.json
coordinator.pub          the key it is by
recipe.yaml              what the run is
broadcast.safetensors    what `fedex-lora turn` starts from: factors, head and increments
adapter/                 the same start as a PEFT adapter, for any trainer
increment/               from round 2 on: what the frozen base has grown by, as a PEFT adapter
update/                  what comes back: a PEFT adapter and update.json; scores.json where clients
                         score the model that they were sent

The folders that follow the last round are for scores alone: without adapter/ and increment/.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from fedex_lora.disk import parsed, reason
from fedex_lora.errors import ProtocolError, StorageError
from fedex_lora.runs.by_hand.signing import fingerprint, verify

TURN, SIGNATURE, KEY = "turn.json", "turn.json.sig", "coordinator.pub"
RECIPE, BROADCAST = "recipe.yaml", "broadcast.safetensors"
ADAPTER, INCREMENT, UPDATE, INFO = "adapter", "increment", "update", "update.json"
SCORES = "scores.json"
FORMAT = 2


class Told(BaseModel):
    """What update.json says: how many rows were trained on, and numbers for the records."""

    examples: Annotated[int, Field(ge=1, strict=True)] | None = None
    metrics: dict[str, FiniteFloat] = {}


class Scored(BaseModel):
    """What scores.json says: how good the model sent is, on so many of the client's own rows."""

    rows: Annotated[int, Field(ge=1, strict=True)]
    scores: dict[str, float]


@dataclass(frozen=True)
class Turn:
    """What turn.json says.

    Attributes:
        run: The run's number.
        round: The round to train.
        rounds: Of the run.
        client: Whose turn it is.
        token: What only the coordinator and this client know of the turn.
        trains: Which factors are trained, of "A" and "B"; none where scores alone are asked for.
        scores: Whether the client is to score the model that it is sent.
        agreed: What recipes must have in common, by dotted name.
        digests: Of the pretrained weights, the tokenizer and the initial adapter.
        files: SHA-256 of the other files, by path in the folder.
    """

    run: str
    round: int
    rounds: int
    client: str
    token: str
    trains: list[str]
    scores: bool
    agreed: dict[str, Any]
    digests: dict[str, str]
    files: dict[str, str]

    def text(self) -> bytes:
        """As it is written."""
        return (json.dumps({"format": FORMAT, **vars(self)}, indent=1) + "\n").encode()


_TURN = TypeAdapter(Turn)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 by path of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files}


def turn_of(text: bytes, where: str) -> Turn:
    """What a turn.json says.

    Raises:
        UserError: It is none, or another version's.
    """
    try:
        value = parsed(text)
        found = value.pop("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise ProtocolError(
                f"{where}: of format {found}, expected {FORMAT}; install the coordinator's version"
            )
        return _TURN.validate_python(value)
    except (ValueError, KeyError, ValidationError) as error:
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"{where}: no turn's description: it was damaged") from None


def changed(folder: Path, turn: Turn) -> list[str]:
    """Files of a turn that are there, and are not as the coordinator wrote them."""
    return [
        name
        for name, digest in turn.files.items()
        if (folder / name).is_file() and sha256((folder / name).read_bytes()) != digest
    ]


def read_turn(folder: Path, key: Path | None = None) -> tuple[Turn, str]:
    """What the folder of a turn says, if all of it is as the coordinator signed it.

    Args:
        key: The coordinator's public key, if it is known from elsewhere; else that in the folder.

    Returns:
        The turn, and the fingerprint of the coordinator's key.

    Raises:
        UserError: A file is missing or changed, or the signature is another's.
    """
    where = folder / TURN
    try:
        text, signature = where.read_bytes(), (folder / SIGNATURE).read_bytes()
        pem = (key or folder / KEY).read_bytes()
    except OSError as error:
        raise StorageError(
            f"{error.filename}: {reason(error)}; expected the folder that `fedex-lora round open` "
            "wrote for this client"
        ) from None
    verify(text, signature, pem, str(where))
    turn = turn_of(text, str(where))
    wrong = [f"{name}: is missing" for name in turn.files if not (folder / name).is_file()]
    wrong += [f"{name}: was changed" for name in changed(folder, turn)]
    if wrong:
        raise ProtocolError(
            f"{folder}: {wrong[0]} since the coordinator signed it. Take the folder once more, and "
            "change nothing outside of update/"
        )
    return turn, fingerprint(pem)


_EXPECTED: dict[type[BaseModel], str] = {
    Told: '{"examples": 512}, the number of rows that were trained on',
    Scored: '{"rows": 57, "scores": {"accuracy": 0.8}}, of the model before the training',
}
Found = TypeVar("Found", bound=BaseModel)


def told(kind: type[Found], path: Path) -> Found | None:
    """What a file of an update says, an update.json or a scores.json; None if it is absent.

    Raises:
        UserError: It is none.
    """
    try:
        return kind.model_validate(parsed(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        wrong = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            wrong = "".join(f"{part}: " for part in first["loc"]) + first["msg"]
        raise ProtocolError(f"{path.name}: {wrong}; expected {_EXPECTED[kind]}") from None
