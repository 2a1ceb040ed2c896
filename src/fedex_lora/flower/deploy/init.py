"""`deploy init`: everything a federation across machines needs on disk."""

from __future__ import annotations

import getpass
import ipaddress
import json
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedex_lora import __version__
from fedex_lora.disk import reason, write_atomic, write_secret
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.flower.deploy import templates
from fedex_lora.flower.deploy.keys import write_certificates, write_key_pair
from fedex_lora.flower.deploy.names import check_client_names

FILE = "deployment.json"
ROSTER = "roster"  # in an institution's folder, with a NAME.pub of every one


@dataclass(frozen=True)
class Deployment:
    """What `deploy init` was told.

    Attributes:
        host: Name or address under which clients reach the server.
        port: Its port.
        clients: Names of the institutions.
        insecure: Without TLS and keys, on loopback alone.
        others: Further names and addresses of the server.
    """

    host: str
    port: int
    clients: tuple[str, ...]
    insecure: bool = False
    others: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """All names and addresses of the server."""
        return (self.host, *self.others)

    @property
    def local(self) -> str:
        """The server's address as the coordinator itself uses it."""
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        """The server's address as clients use it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def read_deployment(path: Path) -> Deployment:
    """What stands in a deployment's (or a client's) folder.

    Raises:
        UserError: It is none, or may not be read.
    """
    try:
        raw = json.loads((path / FILE).read_text())
        clients, others = tuple(raw["clients"]), tuple(raw.get("others", ()))
        return Deployment(raw["host"], raw["port"], clients, raw["insecure"], others)
    except PermissionError:
        raise RecipeError(f"{path / FILE}: this account may not read it; use its owner's") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(
            f"{path}: no deployment there ({FILE}); make one: fedex-lora deploy init {path}"
        ) from None


def client_folder(folder: Path, name: str) -> Path:
    """An institution's own folder: the one that was handed over, or that within a deployment."""
    within = folder / "clients" / name
    own = folder if (folder / "key").exists() or not (within / FILE).exists() else within
    return own.resolve()


def write_deployment(path: Path, deployment: Deployment) -> None:
    """Writes what `read_deployment` reads."""
    write_atomic(path / FILE, (json.dumps(asdict(deployment)) + "\n").encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it.

    Example:
        >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("10.0.0.2")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def init(path: Path, deployment: Deployment) -> None:
    """Writes the folder, which its owner alone may enter.

    Raises:
        UserError: It is in use, a name is none, or `insecure` for a host that others can reach.
    """
    _check(path, deployment)
    with writing(path):
        _write(path, deployment)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk or the account does not allow into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {reason(error)}; name a directory of yours with room"
        ) from None


def _write(path: Path, deployment: Deployment) -> None:
    server = path / "server"
    new_folders(path, server, path / "clients")
    if not deployment.insecure:
        new_folders(path / "ca")
        write_certificates(path / "ca", server, deployment.hosts)
    for name in ("runtime.secret", "control.secret"):
        write_secret(server / name, secrets.token_hex(32).encode())
    write_app(path, deployment.local, None if deployment.insecure else server)
    write_deployment(path, deployment)
    (server / "fedex-lora-server.service").write_text(
        templates.SERVER_UNIT.format(
            user=getpass.getuser(), folder=path.resolve(), program=program()
        )
    )
    for name in deployment.clients:
        init_client(path, deployment, name)
    write_rosters(path, deployment.clients)
    blocks = "".join(templates.COMPOSE_CLIENT.format(name=name) for name in deployment.clients)
    (path / "compose.yaml").write_text(
        templates.COMPOSE.format(port=deployment.port, clients=blocks)
    )


def new_folders(*folders: Path) -> None:
    """Folders that their owner alone may enter, whatever the umask."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def write_app(path: Path, address: str, certificates: Path | None) -> None:
    """The thin Flower app, and Flower's own configuration for its commands."""
    new_folders(*(path / folder for folder in ("app", "flower", "runs")))
    (path / "app" / "pyproject.toml").write_text(templates.APP)
    secure = f"root-certificates = {json.dumps(str(certificates.resolve() / 'ca.crt'))}" if (
        certificates
    ) else "insecure = true"  # fmt: skip
    text = templates.CONNECTION.format(address=address, security=secure)
    (path / "flower" / "config.toml").write_text(text)


def program() -> str:
    """How this program is called from a service."""
    found = shutil.which("fedex-lora")
    return found or f"{sys.executable} -m fedex_lora"


def init_client(path: Path, deployment: Deployment, name: str) -> None:
    """The folder of one institution."""
    folder = path / "clients" / name
    new_folders(folder)
    if not deployment.insecure:
        write_key_pair(folder / "key")
        shutil.copy(path / "server" / "ca.crt", folder / "ca.crt")
    write_secret(folder / "runtime.secret", secrets.token_hex(32).encode())
    write_deployment(folder, replace(deployment, clients=(name,)))
    unit = templates.CLIENT_UNIT.format(name=name, program="/usr/local/bin/fedex-lora")
    (folder / "fedex-lora-client.service").write_text(unit)
    readme = templates.CLIENT_README.format(name=name, version=__version__)
    (folder / "README.txt").write_text(readme)


def write_rosters(path: Path, names: Sequence[str]) -> None:
    """Gives these institutions the public keys of all that there are, by which they know each
    other; see `deploy.roster`."""
    for name in names:
        folder = path / "clients" / name / ROSTER
        for key in sorted(path.glob("clients/*/key.pub")):
            new_folders(folder)
            shutil.copy(key, folder / f"{key.parent.name}.pub")


def _check(path: Path, deployment: Deployment) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"{path}: is in use; name a new or empty directory")
    far = [host for host in deployment.hosts if not is_loopback(host)]
    if deployment.insecure and far:
        raise RecipeError(
            f"`insecure`: without TLS and keys a server must be reachable from this machine alone, "
            f"{far[0]} is not; use `host=127.0.0.1`, or leave `insecure` out"
        )
    if not 0 < deployment.port < 65536:
        raise RecipeError(f"`port`: expected 1 to 65535, got {deployment.port}")
    check_client_names(deployment.clients)
