"""Folders on whatever fsspec knows: a disk, a share, S3, SFTP; `memory://` in tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from fedex_lora.disk import reason
from fedex_lora.errors import StorageError


def below(address: str, *names: str) -> str:
    """The address of something in a folder.

    Example:
        >>> below("s3://bucket/run/", "round-0001", "ann"), below("out", "ann")
        ('s3://bucket/run/round-0001/ann', 'out/ann')
    """
    return "/".join([address.rstrip("/"), *names])


def put(folder: Path, address: str, last: str) -> None:
    """Copies the files of a folder to an address; what else lies there stays.

    Args:
        last: The file that comes last: where it is, all others are.

    Raises:
        UserError: The address cannot be written.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files.sort(key=lambda path: path == folder / last)
    with _reaching(address):
        system, root = _system(address)
        for file in files:
            name = file.relative_to(folder).as_posix()
            system.makedirs(below(root, name).rpartition("/")[0], exist_ok=True)
            system.put_file(str(file), below(root, name))


def read(address: str, name: str) -> bytes | None:
    """A file of the folder at an address; None where there is none.

    Raises:
        UserError: The address cannot be read.
    """
    with _reaching(address):
        system, root = _system(address)
        if not system.exists(root):
            raise FileNotFoundError("there is no such folder")
        path = below(root, name)
        return system.cat_file(path) if system.isfile(path) else None


@contextmanager
def local(address: str) -> Iterator[Path]:
    """The folder at an address on this machine's disk: itself, or a copy for the time being.

    Raises:
        UserError: There is none, or it cannot be read as a whole.
    """
    with tempfile.TemporaryDirectory() as work:
        with _reaching(address):
            system, root = _system(address)
            here = Path(root) if _is_disk(system) else Path(work) / "folder"
            if not system.isdir(root):
                raise FileNotFoundError("there is no such folder")
            if not _is_disk(system):
                for path in system.find(root):
                    to = here / path.removeprefix(root).lstrip("/")
                    to.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(path, str(to))
        yield here


def keep(folder: Path, address: str, name: str, last: str) -> str:
    """Puts a folder made on this disk to the address, as its subfolder `name`, in place of an
    earlier one.

    Returns:
        Its address.
    """
    to = below(address, name)
    with _reaching(to):
        system, root = _system(to)
        if _is_disk(system):
            new = Path(root).with_name(f".{name}.partial")
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(folder, new)
            shutil.rmtree(root, ignore_errors=True)
            new.rename(root)
            return to
        if system.exists(below(root, last)):
            system.rm_file(below(root, last))
    put(folder, to, last)
    return to


def _system(address: str) -> tuple[Any, str]:
    system, root = url_to_fs(address)
    return system, root.rstrip("/") or "/"


def _is_disk(system: Any) -> bool:
    protocol = system.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # every file system has kinds of its own
        raise StorageError(
            f"{address}: cannot be reached: {reason(error) or type(error).__name__}. Nothing is "
            "lost: mend that (a share that is mounted, an address as fsspec writes it, its "
            "library installed), then give the same command again"
        ) from None
