"""Keeps a deployment's processes running, and ends them with this one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Protocol

from fedex_lora.disk import reason, write_secret
from fedex_lora.errors import DeploymentError, StorageError
from fedex_lora.flower.deploy import commands
from fedex_lora.flower.deploy.commands import Command
from fedex_lora.flower.deploy.init import Deployment
from fedex_lora.flower.deploy.keys import client_context
from fedex_lora.flower.deploy.proxy import Proxy
from fedex_lora.flower.deploy.words import Log
from fedex_lora.runs.lock import interrupted_by_signals, locked


class Say(Protocol):
    """Shows a line. `trouble` says whether a line of what happens is that; other lines have none,
    and no time."""

    def __call__(self, text: str, trouble: bool | None = None, /) -> object: ...


_OFTEN = 0.5  # seconds
_PAUSE = 5.0  # seconds before a process that ended is started again
_QUICK = 30.0  # an end within so many seconds of the start counts as a failure to start
_AHEAD, _BEHIND = 4.0, 14.0  # seconds; a second less than what Flower allows a signature
_FAILURES = 15  # in a row; a node that was killed is refused for up to a minute


def serve(path: Path, deployment: Deployment, say: Say) -> None:
    """Runs SuperLink and SuperExec until a signal comes, and registers the institutions' keys.

    Raises:
        UserError: The port is in use, or a process does not stay up.
    """
    check_port(deployment.port)
    make_private(path)
    link, executor = commands.superlink(path, deployment), commands.superexec(path, deployment)
    log = path / "server" / "flower.log"
    (path / "server" / "ready").unlink(missing_ok=True)  # see `fedex_lora.flower.control`
    with _until_interrupted(), running([link], say, log) as link_ended:
        await_port(deployment.port, link_ended)
        register = commands.members(path, deployment)
        say(f"$ {shlex.join(register.argv)}")
        done = run_to_end(register)
        if done.returncode:
            told = (done.stdout + done.stderr).strip()[-600:]
            raise DeploymentError(f"the institutions' keys cannot be registered: {told}")
        with running([executor], say, log) as executor_ended:
            say(f"ready for clients at {deployment.address}")
            _supervise(lambda: [*link_ended(), *executor_ended()])


def make_private(path: Path) -> None:
    """Closes a deployment to other accounts, also one that an earlier version made.

    Raises:
        UserError: It belongs to another account.
    """
    folders = [path, *(folder for folder in path.iterdir() if folder.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o700)
        for file in (path / "server").iterdir():
            file.chmod(0o600)
    except OSError as error:
        raise DeploymentError(
            f"{path}: cannot be closed to other accounts: {reason(error)}; run this under the "
            "account that owns it"
        ) from None
    secret = path / "server" / "control.secret"
    if not secret.exists():
        write_secret(secret, secrets.token_hex(32).encode())


def attend(
    programs: Sequence[Command], say: Say, log: Path, now_and_then: Callable[[], object]
) -> None:
    """Runs a SuperNode and its SuperExec until a signal comes; starts them again if they end.

    Args:
        log: Of all that they print.
        now_and_then: Called twice a second.

    Raises:
        UserError: One does not stay up.
    """
    with _until_interrupted(), running(programs, say, log) as ended:

        def look() -> list[str]:
            now_and_then()
            return ended()

        _supervise(look)


def alone(folder: Path, what: str) -> AbstractContextManager[None]:
    """While this process is at it, no other one does `what` with the folder.

    Raises:
        UserError: Another one does; its number is named. Or the folder is another account's.
    """
    return locked(
        folder,
        f"{{process}} runs `{what}` with this folder already; end that one, or let it go on",
        "cannot be written: {reason}; run this under the account that owns it",
    )


@contextmanager
def running(programs: Sequence[Command], say: Say, log: Path) -> Iterator[Callable[[], list[str]]]:
    """Starts processes, each in a session of its own, and ends them and their children after.

    Args:
        say: Is told what people should see of their output, in our words (`words`).
        log: A file for all of it.

    Yields:
        A function that starts again whatever has ended, after a pause, and names what keeps ending.
    """
    told = Log(say, log)
    kept = [_Kept(program, told) for program in programs]
    try:
        for one in kept:
            say(f"$ {shlex.join(one.command.argv)}")
            one.start()
        yield lambda: [f"{one.command.name} ({told.last})" for one in kept if one.look()]
    finally:
        for one in kept:
            one.end()


class _Kept:
    """One process that is started again when it ends."""

    def __init__(self, command: Command, log: Log) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[bytes] | None = None
        self.started = self.ended = 0.0
        self.failures = 0

    def start(self) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command.argv,
            env=self.command.environment(),
            start_new_session=True,
            umask=0o077,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.take(line.decode(errors="replace"), self.command.name)

    def look(self) -> bool:
        """Starts it again if need be; whether it has failed too often."""
        if self.process is not None and self.process.poll() is not None:
            code, self.ended = self.process.returncode, time.monotonic()
            self.failures = self.failures + 1 if self.ended - self.started < _QUICK else 0
            self.log.say(f"{self.command.name} ended ({code}); starting it again", trouble=True)
            self.end()
        due = time.monotonic() - self.ended > _PAUSE
        if self.process is None and self.failures < _FAILURES and due:
            self.start()
        return self.failures >= _FAILURES

    def end(self) -> None:
        """Ends it and all of its session."""
        process, self.process = self.process, None
        if process is not None:
            end_session(process)


def end_session(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """Asks a process that leads a session to end, and ends what is left of the session."""
    members = set(_session(process.pid))
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    for number in members | set(_session(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    """Processes of a session, and of the sessions that its members began."""
    members: list[int] = []
    parents = _parents()
    leaders = {leader}
    for number, (parent, session) in sorted(parents.items()):
        if session in leaders or parent in leaders or parent in members:
            members.append(number)
            if session == number:
                leaders.add(number)
    return members


def _parents() -> dict[int, tuple[int, int]]:
    """Every process's parent and session; empty where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = entry.read_text().rpartition(")")[2].split()
            found[int(entry.parent.name)] = (int(fields[1]), int(fields[3]))
    return found


def _supervise(look: Callable[[], list[str]]) -> None:
    while not (failing := look()):
        time.sleep(_OFTEN)
    raise DeploymentError(f"{' and '.join(failing)} does not stay up")


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C and the like are how this ends."""
    with contextlib.suppress(KeyboardInterrupt), interrupted_by_signals():
        yield


def listens(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_port(port: int) -> None:
    """Raises a `UserError` if somebody listens there already."""
    if listens(port):
        raise StorageError(
            f"port {port} is in use; end the program that listens there, or choose another "
            "with `port` (of deploy init for a server)"
        )


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_server(
    deployment: Deployment,
    certificates: Path,
    say: Callable[[str], object],
    proxy: Proxy | None = None,
) -> None:
    """That the server's certificate is good from here, and the clocks agree; a server that is down
    is only said so.

    Raises:
        UserError: It is expired, for another name, or by another authority; or a clock is off by
            more than Flower's signatures allow.
    """
    context = client_context(certificates)
    if proxy is None:
        server = HTTPSConnection(deployment.host, deployment.port, timeout=5, context=context)
    else:
        proxy.check()
        server = HTTPSConnection(proxy.host, proxy.port, timeout=5, context=context)
        server.set_tunnel(deployment.host, deployment.port, proxy.headers())
    way = "" if proxy is None else f" by the proxy {proxy}"
    try:
        server.request("HEAD", "/health")
        date = server.getresponse().getheader("Date")
    except ssl.SSLCertVerificationError as error:
        raise DeploymentError(
            f"{deployment.address}{way}: its certificate is not accepted: {error.verify_message}. "
            "Is this machine's clock right, is ca.crt the coordinator's, and is that the address "
            "the certificate was made for? Where an authority of your own signs it, as for proxies "
            "that look into TLS, name its certificate with `ca`"
        ) from None
    except (OSError, HTTPException) as error:
        if refused := re.match(r"Tunnel connection failed: (403|405|407) ?(.*)", str(error)):
            raise DeploymentError(
                f"the proxy {proxy} does not let through to {deployment.address}: {refused[1]} "
                f"{refused[2]}. It has to allow CONNECT to that port; user and password go into "
                "its address, http://USER:PASSWORD@HOST:PORT"
            ) from None
        say(f"{deployment.address}{way} does not answer yet ({error}); waiting for it")
        return
    finally:
        server.close()
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except ValueError:  # what stands between may send no date, or an odd one
        return
    _check_clock(time.time() - theirs)


def _check_clock(ahead: float) -> None:
    """`ahead` of the server's, which was given in whole seconds."""
    if not -_BEHIND < ahead < _AHEAD + 1:
        way = "ahead of" if ahead > 0 else "behind"
        raise DeploymentError(
            f"this machine's clock is {abs(ahead):.0f} s {way} the coordinator's, which refuses "
            f"messages that are dated so; set the clock that is wrong (here it is "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC) by a time server"
        )


def await_port(port: int, look: Callable[[], list[str]], seconds: float = 120.0) -> None:
    """Waits until somebody listens there.

    Raises:
        UserError: Nobody does, for so long; or the process does not stay up.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if look():
            break
        if listens(port):
            return
        time.sleep(_OFTEN)
    raise DeploymentError("the SuperLink does not come up; what it printed above says why")


def run_to_end(command: Command) -> subprocess.CompletedProcess[str]:
    """Runs a command that ends by itself."""
    return subprocess.run(
        command.argv,
        env=command.environment(),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
