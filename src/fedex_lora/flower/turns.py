"""One task of Flower's in a process of its own; at a client always by the app that is installed.

A run brings its program along (Flower's "FAB"). flwr-clientapp unpacks it, imports it and runs it:
whoever has the SuperLink in hand would run any program at every institution. Here what comes with a
run is neither unpacked nor imported. The installed app answers every message, of whatever run it
is, and of what raises in it the kind alone leaves this machine; the text goes to its own log.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
from io import BytesIO
from queue import Queue
from typing import Any
from zipfile import ZipFile

from flwr.app import Error
from flwr.common.config import get_fab_config
from flwr.supercore.constant import TaskType
from flwr.supercore.logger import mirror_output_to_queue
from flwr.supercore.superexec.executor.types import ExecutionSpec
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.superlink.runtime import run_serverapp

APP = "fedex_lora.flower.client_app:app"
_LARGE = 1_000_000  # bytes of a file that is only looked at
log = logging.getLogger("fedex_lora")

# by its name: the package has a function of the same name
_flower = importlib.import_module("flwr.supernode.runtime.run_clientapp")


def turn(spec: ExecutionSpec, app: str = APP) -> None:
    """One task: what flwr-clientapp does, but for the program; or what flwr-serverapp does.

    Args:
        app: The client app that answers, of a package that is installed here.
    """
    certificates = validate_and_resolve_root_certificates(
        spec.root_certificates_path, spec.insecure
    )
    where = (spec.insecure, certificates, spec.parent_pid, False)  # nothing is installed
    if spec.task_type == TaskType.CLIENT_APP:
        tell()
        keep_to(app)
        _flower.run_clientapp(spec.runtime_api_address, spec.token, *where)
        return
    said: Queue[str | None] = Queue()
    mirror_output_to_queue(said)
    run_serverapp(spec.runtime_api_address, said, spec.token, *where)


def keep_to(app: str) -> None:
    """From now on this process answers every run by `app`, and tells errors by their kind alone.

    Raises:
        RuntimeError: Another version of Flower, which does these things elsewhere; better no client
            than one that runs what it is sent.
    """
    module, _, name = app.partition(":")
    ours = {
        "install_from_fab": _set_aside,
        "get_load_client_app_fn": lambda **_: (
            lambda *_: getattr(importlib.import_module(module), name)
        ),
        "Error": _kind_alone,
    }
    for there, here in ours.items():
        if not hasattr(_flower, there):
            raise RuntimeError(f"this version of Flower has no {_flower.__name__}.{there}")
        setattr(_flower, there, here)


def tell() -> None:
    """This program's own lines go to the client's log; in the form of Flower's where they are
    grave, see `deploy.words`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Form())
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class _Form(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        grave = f"{record.levelname} : " if record.levelno >= logging.WARNING else ""
        return grave + super().format(record)


def _set_aside(fab: bytes, **_: Any) -> None:
    """What a run brought along stays packed; said, where it is more than the name of our app."""
    try:
        members = {m.filename: m.file_size for m in ZipFile(BytesIO(fab)).infolist()}
        files = [name for name in members if not name.startswith(".info/")]
        if members["pyproject.toml"] > _LARGE:
            raise ValueError("too large")
        config = get_fab_config(fab)["tool"]["flwr"]["app"]
        theirs = str(config["components"]["clientapp"])
    except Exception as error:
        theirs, files = f"unreadable: {type(error).__name__}", []
    if theirs != APP or files != ["pyproject.toml"]:
        log.warning(
            "run %s of the coordinator's Flower brought a program (%.80r, %d files, SHA-256 %s): "
            "it is not run here; the installed fedex-lora answers",
            TaskIdentity.run_id,
            theirs,
            len(files),
            hashlib.sha256(fab).hexdigest()[:16],
        )


def _kind_alone(code: int, reason: str | None = None) -> Error:
    """Flower's reason is `<class 'ValueError'>:<'text'>`; the text may be anything, a row too."""
    return Error(code=code, reason=(reason or "").partition(":<")[0] + "; its own log says why")
