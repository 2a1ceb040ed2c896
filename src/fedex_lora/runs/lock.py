"""One process at a time writes into a run's directory, and the others are told which."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fedex_lora.disk import parsed, reason, write_atomic
from fedex_lora.errors import StorageError

LOCK, OWNER = ".lock", ".lock.json"  # what is locked, and who did (on Windows nobody reads LOCK)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, which ends with the process, however that ends.

    Args:
        directory: It is there.

    Raises:
        UserError: Another process holds it, or nobody can.
    """
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StorageError(
            f"{directory}: in use by {_owner(directory)}; wait for it or end it, or name another "
            "directory"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(f"{directory}: cannot be locked: {reason(error)}") from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        write_atomic(directory / OWNER, json.dumps(owner).encode())
        yield
    finally:
        (directory / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(directory: Path) -> str:
    try:
        told = parsed((directory / OWNER).read_bytes())
        return f"process {told['process']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it has just begun, or is just ending
        return "another process"
