"""The Flower commands of a deployment: what is run, and with which environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedex_lora.errors import RecipeError
from fedex_lora.flower.deploy.init import Deployment, is_loopback
from fedex_lora.flower.deploy.proxy import Proxy, past_proxies, through

CONNECTION = "fedex"  # of Flower's config.toml
EXECUTOR = "fedex_lora.flower.superexec"
_FLWR = (sys.executable, "-m", "fedex_lora.flower.control")  # flwr, with the secret


@dataclass(frozen=True)
class Command:
    """One process of Flower's.

    Attributes:
        name: For messages.
        argv: Its arguments.
        env: What its environment has besides this process's.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]

    def environment(self) -> dict[str, str]:
        """All of it. Flower's programs are found beside this Python."""
        own = str(Path(sys.executable).parent)
        path = os.pathsep.join([own, os.environ.get("PATH", "")])
        return {**os.environ, "PATH": path, **self.env}


def superlink(path: Path, deployment: Deployment) -> Command:
    """The SuperLink, behind the guard of `fedex_lora.flower.superlink`."""
    server = path / "server"
    argv = [sys.executable, "-m", "fedex_lora.flower.superlink"]
    argv += ["--host", _bind(deployment), "--port", str(deployment.port)]
    argv += ["--isolation", "process", "--database", str(server / "state.db")]
    argv += ["--superexec-auth-secret-file", str(server / "runtime.secret")]
    argv += ["--disable-runtime-dependency-installation"]
    if deployment.insecure:
        argv += ["--insecure"]
    else:
        argv += ["--ssl-ca-certfile", str(server / "ca.crt"), "--enable-supernode-auth"]
        argv += ["--ssl-certfile", str(server / "server.pem")]
        argv += ["--ssl-keyfile", str(server / "server.key")]
    keys = {} if deployment.insecure else {"FEDEX_LORA_CLIENTS": str(path / "clients")}
    return Command("SuperLink", tuple(argv), {**control(path), **keys})


def superexec(path: Path, deployment: Deployment) -> Command:
    """What starts the coordinator's part of a run; a process of its own outlives the SuperLink."""
    server = path / "server"
    argv = [*_superexec(server, deployment.local), *_trust(deployment, server)]
    return Command("SuperExec", tuple(argv), environment(path / "flower"))


def client_superexec(path: Path, port: int) -> Command:
    """What starts a process for every message that the SuperNode at `port` receives."""
    argv = [*_superexec(path, f"127.0.0.1:{port}"), "--insecure"]  # loopback, with a secret
    argv += ["--parent-pid", str(os.getpid())]  # ends with this process, however that ends
    return Command("SuperExec", tuple(argv), environment(path / "flower"))


def _superexec(folder: Path, address: str) -> list[str]:
    argv = [sys.executable, "-m", EXECUTOR, "--runtime-api-address", address]
    return [*argv, "--superexec-auth-secret-file", str(folder / "runtime.secret")]


def supernode(
    path: Path,
    deployment: Deployment,
    name: str,
    recipe: Path,
    data: Path | None,
    port: int,
    certificates: Path | None = None,
    proxy: Proxy | None = None,
    **own: float,
) -> Command:
    """One institution's SuperNode; what its client app needs comes from its own configuration.

    Args:
        certificates: Those it trusts; the folder's ca.crt by default.
        proxy: By which it reaches the server.
        own: `runs`, `ask`, `show-rows` and `epsilon` of `fedex_lora.flower.client_app.reply_to`.
    """
    place = {"client": name, "recipe": str(recipe), "home": str(path)}
    if data is not None:
        place["data"] = str(data)
    config = " ".join(f"{key}={_quoted(value)}" for key, value in place.items())
    config += "".join(f" {key}={value}" for key, value in own.items())
    argv = [sys.executable, "-m", "fedex_lora.flower.supernode"]
    argv += ["--superlink", deployment.address]
    argv += _trust(deployment, path, certificates)
    if not deployment.insecure:
        argv += ["--auth-supernode-private-key", str(path / "key")]
    argv += ["--isolation", "process"]
    argv += ["--superexec-auth-secret-file", str(path / "runtime.secret")]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--node-config", config]
    env = {**environment(path / "flower"), **through(proxy, deployment.host)}
    return Command("SuperNode", tuple(argv), env)


def members(path: Path, deployment: Deployment) -> Command:
    """Tells the SuperLink the institutions' public keys, and to let them in."""
    what = ["ready"] if deployment.insecure else ["members", str(path / "clients")]
    return Command("registration", (*_FLWR, *what), control(path))


def simulation(path: Path, port: int) -> Command:
    """A SuperLink that simulates nodes, for this machine alone."""
    argv = [sys.executable, "-m", "fedex_lora.flower.superlink", "--insecure", "--simulation"]
    argv += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--disable-runtime-dependency-installation"]
    quiet = {"RAY_DISABLE_DOCKER_CPU_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return Command("SuperLink", tuple(argv), {**control(path), **quiet})


def start(path: Path, config: Path, options: str | None = None) -> Command:
    """Starts a run with the configuration in a TOML file; `options` are a simulation's."""
    argv = [*_FLWR, "run", str(path / "app"), CONNECTION]
    argv += ["--run-config", str(config), "--format", "json"]
    argv += ["--federation-config", options] if options else []
    return Command("start of the run", tuple(argv), control(path))


def status(path: Path, run: int) -> Command:
    """Asks what became of a run."""
    argv = [*_FLWR, "list", CONNECTION, "--run-id", str(run), "--format", "json"]
    return Command("status of the run", tuple(argv), control(path))


def stop(path: Path, run: int) -> Command:
    """Stops a run."""
    argv = [*_FLWR, "stop", str(run), CONNECTION]
    return Command("stopping the run", tuple(argv), control(path))


def environment(home: Path) -> dict[str, str]:
    """Flower keeps to its folder, asks nobody outside, and installs nothing."""
    return {
        **past_proxies(),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def control(path: Path) -> dict[str, str]:
    """The environment with the secret that the SuperLink's control paths ask for."""
    secret = path / "server" / "control.secret"
    return {**environment(path / "flower"), "FEDEX_LORA_CONTROL": str(secret)}


def _bind(deployment: Deployment) -> str:
    """Loopback, where nothing else was named for the server; else all of this machine's addresses,
    those of IPv6 too where one was named."""
    six = any(":" in host for host in deployment.hosts)
    if all(map(is_loopback, deployment.hosts)):
        return "::1" if six else "127.0.0.1"
    return "::" if six else "0.0.0.0"


def _trust(deployment: Deployment, folder: Path, own: Path | None = None) -> list[str]:
    if deployment.insecure:
        return ["--insecure"]
    return ["--root-certificates", str(own or folder / "ca.crt")]


def _quoted(value: str) -> str:
    if '"' in value or "\\" in value:
        raise RecipeError(f"{value}: a path with quotes or backslashes cannot be used here")
    return f'"{value}"'
