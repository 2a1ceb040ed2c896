"""The command line. Whatever the user can mend is one short text and exit code 2."""

from __future__ import annotations

import io
import logging
import sys

from fedex_lora.cli import (  # noqa: F401 (each adds its commands to the app)
    attacks,
    costs,
    data,
    demo,
    deploys,
    evaluate,
    grids,
    hands,
    lists,
    merges,
    new,
    plans,
    reports,
    runs,
    serves,
)
from fedex_lora.cli.common import app, complain, console, phase, phases
from fedex_lora.cli.json_lines import Lines
from fedex_lora.disk import reason
from fedex_lora.errors import EXTRAS, QuorumLost, UserError, missing

__all__ = ["app", "console", "main"]


def main() -> None:
    """Entry point: errors of the user become text on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # latin-1, say, or cp1252 in a file of Windows
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, handlers=[Lines()])
    # when imported it advises to install kernels for 4-bit products; most models have none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    phase.setLevel(logging.INFO)
    phase.addHandler(phases)
    phase.propagate = False
    try:
        app()
    except QuorumLost as error:
        complain(f"stopped: {error}")
        complain(
            "What was finished before is intact. Mend the cause (for a loss that is nan: a lower "
            "learning rate), then `fedex-lora resume RUN` or begin a new run."
        )
        sys.exit(2)
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.filename is None or isinstance(error, FileNotFoundError):
            raise
        complain(f"error: {error.filename}: {reason(error)}; name another place, or mend this one")
        sys.exit(2)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        complain(f"error: {missing(module)}")
        sys.exit(2)
