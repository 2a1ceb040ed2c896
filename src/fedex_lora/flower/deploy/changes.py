"""What changes in a deployment that is in use: who is in it, and its server's certificate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fedex_lora.errors import RecipeError, StorageError, UserError
from fedex_lora.flower.deploy import commands
from fedex_lora.flower.deploy.init import (
    Deployment,
    init_client,
    new_folders,
    read_deployment,
    write_deployment,
    write_rosters,
    writing,
)
from fedex_lora.flower.deploy.keys import renew_certificate, take_certificate
from fedex_lora.flower.deploy.names import check_client_names
from fedex_lora.flower.deploy.processes import listens, run_to_end

REVOKED = "revoked"  # as `fedex_lora.flower.refusals` has it


def add(path: Path, names: Sequence[str], say: Callable[[str], object]) -> list[Path]:
    """Makes folders for more institutions; a server that runs lets them in at once.

    Raises:
        UserError: A name is none, or is there already, on one file system or another.
    """
    deployment = read_deployment(path)
    check_client_names(names, deployment.clients)
    for name in names:
        if (path / "clients" / name).exists():
            raise StorageError(f"{path / 'clients' / name}: is there already; move it away first")
    folders = [path / "clients" / name for name in names]
    try:
        with writing(path):
            for name in names:
                init_client(path, deployment, name)
            write_rosters(path, names)
            write_deployment(path, replace(deployment, clients=(*deployment.clients, *names)))
    except UserError:
        for folder in folders:  # nobody has them yet
            shutil.rmtree(folder, ignore_errors=True)
        raise
    tell_server(path, say)
    return folders


def revoke(path: Path, name: str, say: Callable[[str], object]) -> None:
    """Takes an institution out: the server refuses its key from the next request on.

    Its folder is kept in `revoked`, so that the server can say whose key it was.

    Raises:
        UserError: There is no such institution.
    """
    deployment = read_deployment(path)
    if name not in deployment.clients:
        known = ", ".join(deployment.clients[:10]) or "nobody"
        raise RecipeError(f"{name!r} is not in this deployment, which has {known}")
    folder, kept = path / "clients" / name, path / REVOKED / name
    if kept.exists():
        kept = kept.with_name(f"{name}.{time.strftime('%Y%m%d-%H%M%S')}")
    with writing(path):
        new_folders(path / REVOKED)
        if folder.exists():
            folder.rename(kept)  # which the server sees
            (kept / "key").unlink(missing_ok=True)
        left = tuple(other for other in deployment.clients if other != name)
        write_deployment(path, replace(deployment, clients=left))
    tell_server(path, say)


def renew(path: Path, hosts: Sequence[str], authority: Path | None = None) -> datetime:
    """A new key and certificate for the server, by the same authority, so clients need nothing new.

    Args:
        hosts: Names and addresses of the server; none for those it has.
        authority: The file ca.key, where it is kept elsewhere.

    Returns:
        Until when it is good.

    Raises:
        UserError: The authority's key is not there or not its, or its certificate has expired.
    """
    deployment = _secured(path, hosts)
    key = authority or path / "ca" / "ca.key"
    with writing(path):
        until = renew_certificate(key, path / "server", deployment.hosts)
        write_deployment(path, deployment)
    return until


def take(
    path: Path,
    certificate: Path,
    key: Path,
    authority: Path | None = None,
    hosts: Sequence[str] = (),
) -> tuple[datetime, bool]:
    """A certificate of the server by an authority of one's own, in place of the one made here.

    Args:
        authority: Its certificates; by default those that clients trust already.
        hosts: As of `renew`.

    Returns:
        Until when it is good, and whether the clients' ca.crt is another now.

    Raises:
        UserError: What `keys.take_certificate` finds.
    """
    deployment = _secured(path, hosts)
    trusted = path / "server" / "ca.crt"
    with writing(path):
        before = trusted.read_bytes()
        until = take_certificate(certificate, key, authority, path / "server", deployment.hosts)
        for name in deployment.clients:
            if (folder := path / "clients" / name).is_dir():
                shutil.copy(trusted, folder / "ca.crt")
        write_deployment(path, deployment)
    return until, trusted.read_bytes() != before


def _secured(path: Path, hosts: Sequence[str]) -> Deployment:
    deployment = read_deployment(path)
    if deployment.insecure:
        raise RecipeError(f"{path}: made with `insecure=True`; it has no certificate")
    return replace(deployment, host=hosts[0], others=tuple(hosts[1:])) if hosts else deployment


def tell_server(path: Path, say: Callable[[str], object]) -> None:
    """Has the server's list of keys brought up to date, if it runs."""
    deployment = read_deployment(path)
    if deployment.insecure or not listens(deployment.port):
        return
    done = run_to_end(commands.members(path.resolve(), deployment))
    if done.returncode:
        told = (done.stdout + done.stderr).strip()[-300:]
        say(f"the server does not take it ({told}); start `deploy server` anew")
        return
    for line in done.stdout.splitlines():
        if line.startswith(("registered", "forgot")):
            say(line)
