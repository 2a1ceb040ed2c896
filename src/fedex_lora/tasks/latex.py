"""Whether two answers in LaTeX mean the same, by the library math-verify, in a process of its own.

Model outputs are untrusted: SymPy may be asked for 9^(9^9), in C code that no signal interrupts,
and math-verify's own limits work in a main thread alone. A process can be killed from anywhere.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Timer
from typing import IO, cast

from fedex_lora.errors import RecipeError, check_installed

LONGEST = 400  # characters; those of MATH's test set have at most 159
SECONDS = 10.0  # for one pair
START_SECONDS = 120.0  # for imports, on a machine that is busy

_log = logging.getLogger(__name__)


def require() -> None:
    """Raise a `UserError` if math-verify is not installed."""
    check_installed("math_verify", "task.compare: latex", "or set task.compare: string")


def equal_latex(pairs: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[bool]:
    r"""Whether each (reference, answer), without `$` around them, are the same in mathematics.

    As math-verify decides (`verify`, strict): 1/2 = 0.5, x²+2x+1 = (x+1)², {1,2} = {2,1},
    x = 5 and 5, 50\% and both 50 and 0.5; floats are the same if they are to 6 decimals. What
    takes longer than `seconds`, is longer than `LONGEST` or cannot be read is not the same.

    Raises:
        UserError: math-verify is not installed or does not start.
    """
    sound = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= LONGEST]
    found: list[bool] = []
    while len(found) < len(sound):
        with _started() as child:
            found += child.compare([pairs[i] for i in sound[len(found) :]], seconds)
    verdicts = dict(zip(sound, found))
    return [verdicts.get(i, False) for i in range(len(pairs))]


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[str]

    def compare(self, pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool]:
        """The verdicts up to the pair that this process did not survive, which is unequal."""
        verdicts: list[bool] = []
        for pair in pairs:
            line, alive = self.ask(json.dumps(pair), seconds)
            verdicts.append(line == "1")
            if not alive:
                _log.warning("gave up comparing %.80r with %.80r (limit: %g s)", *pair, seconds)
                break
        return verdicts

    def ask(self, line: str | None, seconds: float) -> tuple[str, bool]:
        """Its answer to a line, and whether it is still there."""
        late = Event()
        timer = Timer(seconds, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            if line is not None:
                cast(IO[str], self.process.stdin).write(line + "\n")
                cast(IO[str], self.process.stdin).flush()
            answer = cast(IO[str], self.process.stdout).readline().strip()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
            timer.join()
        return answer, bool(answer) and not late.is_set()


@contextmanager
def _started() -> Iterator[_Child]:
    require()
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", __file__]  # -P: this folder's modules do not shadow others
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    )
    child = _Child(process)
    try:
        if not child.ask(None, START_SECONDS)[1]:
            raise RecipeError(
                "task.compare: the library math-verify does not start; see what "
                f"{sys.executable} -c 'import math_verify' says, or set task.compare: string"
            )
        yield child
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    """The process: one line of JSON in, one line out, 1 or 0."""
    from math_verify import LatexExtractionConfig, parse, verify  # noqa: PLC0415 - optional

    def read(text: str) -> list:
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=0)

    def same(reference: str, answer: str) -> bool:
        return verify(read(reference), read(answer), timeout_seconds=None)

    logging.disable()
    same("\\frac{x}{2}", "0.5x")  # what is imported on first use is there when time counts
    print("ready", flush=True)
    for line in sys.stdin:
        print(int(same(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
