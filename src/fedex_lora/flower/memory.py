"""What a client remembers between two messages of a round, when a new process answers each.

Flower keeps a run's state in the memory of the SuperNode, for as long as it likes. So secrets go
into it sealed. The key lies on this client's own disk, is another one for every message, and is
deleted when it was used: what Flower still has opens no more then, and neither does an older state.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from fedex_lora.disk import write_secret
from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.primitives import SECRET, seal, unseal

_RECORD, _KEY = "memory", "sealed"


class SealedMemory:
    """A `Memory` in Flower's state.

    Args:
        state: Of the run, at this node.
        path: Of the file with the key.
    """

    def __init__(self, state: RecordDict, path: Path) -> None:
        self._state, self._path = state, path

    def take(self) -> bytes | None:
        """What was kept last; it is there no more."""
        record = self._state.config_records.pop(_RECORD, ConfigRecord())
        try:
            key = self._path.read_bytes()
            self._path.unlink()
            return unseal(key, bytes(record[_KEY]), _RECORD)  # type: ignore[arg-type]
        except (OSError, LookupError, TypeError, ValueError, ProtocolError):
            return None

    def keep(self, secrets: bytes) -> None:
        """Keeps this, in place of what was there."""
        key = os.urandom(SECRET)
        self._path.unlink(missing_ok=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(self._path, key)
        self._state[_RECORD] = ConfigRecord({_KEY: seal(key, secrets, _RECORD)})
