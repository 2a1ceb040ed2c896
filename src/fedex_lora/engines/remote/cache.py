"""A client's memory on its own disk: what it was sent, and factors that only it has.

Files have new names; `held.json` names the ones that count, with their digests, and is replaced
last. So a crash at any moment leaves what was there before, and what is damaged is not used; it is
sent again, and therefore nothing waits for the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import ledger_from, ledger_meta, ledger_tensors, pieces
from fedex_lora.federation.messages import Tensors, flat, variates_in

_INDEX = "held.json"


@dataclass(frozen=True)
class Held:
    """What a client holds.

    Attributes:
        version: After which round the server's state is that it was given.
        mark: Under which start of the coordinator.
        adapter: The factors and the head it was given.
        ledger: All of it, up to the version.
        ends: By round, what it ended with of the tensors that are its own.
    """

    version: int
    mark: str
    adapter: AdapterState
    ledger: Ledger
    ends: Mapping[int, Tensors] = field(default_factory=dict)


class Cache:
    """The folder of one client in one federation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Held | None:
        """What is held; None if there is nothing, or it is not what was written."""
        try:
            index = json.loads((self.path / _INDEX).read_text())
            if index.pop("digest") != _digest(index):
                raise ValueError("what is held was changed")
            tensors = {part: self._read(part, index["files"][part]) for part in index["files"]}
            return _held(index["meta"], tensors)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None

    def clear(self) -> None:
        """Forgets everything: what is held is damaged, or of a history that was thrown away."""
        (self.path / _INDEX).unlink(missing_ok=True)

    def save(self, held: Held) -> None:
        """Replaces what is held. Ledger entries that are there already are not written again.

        Raises:
            UserError: A full disk, or a folder that cannot be written; what was held stays.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be made: {error.strerror}; make room, or let this account "
                "write there"
            ) from None
        there = self._files()
        files = {part: self._write(part, t, there) for part, t in _parts(held).items()}
        meta = {
            "version": held.version,
            "mark": held.mark,
            "scales": {name: f.scale for name, f in held.adapter.layers.items()},
            "pair": {name: f.scale for name, f in held.adapter.pair.items()},
            "ledger": ledger_meta(held.ledger),
            "ends": sorted(held.ends),
        }
        index = {"files": files, "meta": meta}
        index["digest"] = _digest(index)
        _replace(self.path / _INDEX, [json.dumps(index).encode()])
        used = {_name(part, digest) for part, digest in files.items()}
        for file in self.path.glob("*.safetensors"):
            if file.name not in used:
                file.unlink()

    def _files(self) -> dict[str, str]:
        try:
            return json.loads((self.path / _INDEX).read_text())["files"]
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _write(self, part: str, tensors: Mapping[str, Tensor], there: Mapping[str, str]) -> str:
        # an entry of the ledger never changes; a snapshot goes by its version
        if part.startswith("ledger-") and part in there:
            return there[part]
        content, found = pieces(tensors, {}), hashlib.sha256()
        for piece in content:
            found.update(piece)
        _replace(self.path / _name(part, found.hexdigest()), content)
        return found.hexdigest()

    def _read(self, part: str, digest: str) -> dict[str, Tensor]:
        blob = (self.path / _name(part, digest)).read_bytes()
        if hashlib.sha256(blob).hexdigest() != digest:
            raise ValueError(f"{part} is not what was written")
        return load(blob)


def _replace(path: Path, content: Sequence[bytes | memoryview]) -> None:
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.writelines(content)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; make room there. What was held before "
            "is intact, and the rest is sent again"
        ) from None


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _name(part: str, digest: str) -> str:
    return f"{part}-{digest[:16]}.safetensors"


def _parts(held: Held) -> dict[str, Tensors]:
    """Tensors by file: the adapter, every ledger entry, and the ends of each round."""
    parts: dict[str, Tensors] = {"adapter": flat(held.adapter)}
    ledger = held.ledger
    if ledger.snapshot:
        name = f"ledger-snapshot-{ledger.snapshot_version}"
        parts[name] = ledger_tensors(Ledger((), ledger.snapshot, ledger.snapshot_version))
    for version, increment in ledger.entries:
        parts[f"ledger-{version}"] = ledger_tensors(Ledger(((version, increment),)))
    return parts | {f"end-{round}": end for round, end in held.ends.items()}


def _held(meta: Mapping[str, Any], parts: Mapping[str, dict[str, Tensor]]) -> Held:
    ledger: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        if part.startswith("ledger-"):
            ledger |= tensors
    adapter = parts["adapter"]
    head = {k.removeprefix("head/"): t for k, t in adapter.items() if k.startswith("head/")}

    def factors(scales: Mapping[str, float], prefix: str) -> dict[str, Factors]:
        of = {n: (adapter[f"{prefix}A/{n}"], adapter[f"{prefix}B/{n}"]) for n in scales}
        return {n: Factors(*of[n], scale) for n, scale in scales.items()}

    return Held(
        int(meta["version"]),
        str(meta["mark"]),
        AdapterState(
            factors(meta["scales"], ""),
            head,
            variates_in(adapter),
            factors(meta.get("pair", {}), "pair/"),
        ),
        ledger_from(ledger, meta["ledger"]),
        {int(round): parts[f"end-{round}"] for round in meta["ends"]},
    )
