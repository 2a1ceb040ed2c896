"""`deploy init`: everything a federation across machines needs on disk."""

from __future__ import annotations

import getpass
import ipaddress
import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedex_lora import __version__
from fedex_lora.deploy import templates
from fedex_lora.deploy.keys import write_certificates, write_key_pair, write_secret
from fedex_lora.errors import UserError
from fedex_lora.recipe import CLIENT_NAME, CLIENT_NAME_RULE

FILE = "deployment.json"


@dataclass(frozen=True)
class Deployment:
    """What `deploy init` was told.

    Attributes:
        host: Name or address under which clients reach the server.
        port: Its port.
        clients: Names of the institutions.
        insecure: Without TLS and keys, on loopback alone.
    """

    host: str
    port: int
    clients: tuple[str, ...]
    insecure: bool = False

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
        UserError: It is none.
    """
    try:
        raw = json.loads((path / FILE).read_text())
        return Deployment(raw["host"], raw["port"], tuple(raw["clients"]), raw["insecure"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: no deployment there ({FILE}); make one: fedex-lora deploy init {path}"
        ) from None


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
    """Writes the folder.

    Raises:
        UserError: It is in use, a name is none, or `insecure` for a host that others can reach.
    """
    _check(path, deployment)
    server = path / "server"
    server.mkdir(parents=True)
    if not deployment.insecure:
        (path / "ca").mkdir()
        write_certificates(path / "ca", server, [deployment.host])
    write_secret(server / "runtime.secret", secrets.token_hex(32).encode())
    write_app(path, deployment.local, None if deployment.insecure else server)
    (path / FILE).write_text(json.dumps(asdict(deployment)) + "\n")
    (server / "fedex-lora-server.service").write_text(
        templates.SERVER_UNIT.format(
            user=getpass.getuser(), folder=path.resolve(), program=program()
        )
    )
    for name in deployment.clients:
        _init_client(path, deployment, name)
    blocks = "".join(templates.COMPOSE_CLIENT.format(name=name) for name in deployment.clients)
    (path / "compose.yaml").write_text(
        templates.COMPOSE.format(port=deployment.port, clients=blocks)
    )


def write_app(path: Path, address: str, certificates: Path | None) -> None:
    """The thin Flower app, and Flower's own configuration for its commands."""
    for folder in ("app", "flower", "runs"):
        (path / folder).mkdir(parents=True)
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


def _init_client(path: Path, deployment: Deployment, name: str) -> None:
    folder = path / "clients" / name
    folder.mkdir(parents=True)
    if not deployment.insecure:
        write_key_pair(folder / "key")
        shutil.copy(path / "server" / "ca.crt", folder / "ca.crt")
    write_secret(folder / "runtime.secret", secrets.token_hex(32).encode())
    own = Deployment(deployment.host, deployment.port, (name,), deployment.insecure)
    (folder / FILE).write_text(json.dumps(asdict(own)) + "\n")
    unit = templates.CLIENT_UNIT.format(name=name, program="/usr/local/bin/fedex-lora")
    (folder / "fedex-lora-client.service").write_text(unit)
    readme = templates.CLIENT_README.format(name=name, version=__version__)
    (folder / "README.txt").write_text(readme)


def _check(path: Path, deployment: Deployment) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is in use; name a new or empty directory")
    if deployment.insecure and not is_loopback(deployment.host):
        raise UserError(
            f"--insecure: without TLS and keys a server must be reachable from this machine alone, "
            f"{deployment.host} is not; use --host 127.0.0.1, or leave --insecure out"
        )
    if not 0 < deployment.port < 65536:
        raise UserError(f"--port: expected 1 to 65535, got {deployment.port}")
    _check_names(deployment.clients)


def _check_names(names: Sequence[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise UserError("--clients: expected one or more names, all different")
    for name in names:
        if not CLIENT_NAME.fullmatch(name):
            raise UserError(f"--clients: {name!r}: {CLIENT_NAME_RULE}")
