"""One process at a time is at work in a directory, and the others are told which; and what asks it
to end."""

from __future__ import annotations

import json
import os
import signal
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
def locked(
    directory: Path,
    busy: str = "in use by {owner}; wait for it or end it, or name another directory",
    barred: str = "cannot be locked: {reason}",
) -> Iterator[None]:
    """Holds the directory's lock, which ends with the process, however that ends.

    Args:
        directory: It is there.
        busy, barred: What is said where another `{process}` holds it, and where nobody can.

    Raises:
        UserError: Another process holds it, or nobody can.
    """
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StorageError(f"{directory}: {busy.format(**_owner(directory))}") from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(f"{directory}: {barred.format(reason=reason(error))}") from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        write_atomic(directory / OWNER, json.dumps(owner).encode())
        yield
    finally:
        (directory / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(directory: Path) -> dict[str, str]:
    try:
        told = parsed((directory / OWNER).read_bytes())
        process = f"process {told['process']}"
        return {"process": process, "owner": f"{process} on {told['host']} since {told['since']}"}
    except (OSError, ValueError, LookupError, TypeError):  # it has just begun, or is just ending
        return dict.fromkeys(("process", "owner"), "another process")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, end this process as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
