"""Final answers of worked solutions: where they stand in a text, and when two are the same."""

from __future__ import annotations

import re
from fractions import Fraction

from fedex_lora.tasks import numbers

_METAMATH = re.compile(r"the answer is\s*:", re.IGNORECASE)
_GSM8K = re.compile("####")
_BOXED = re.compile(r"\\f?box(?:ed)?(?![a-z])\s*")
_BEGINS = re.compile(r"[^A-Za-z0-9]*(?:[0-9]|[dtc]?frac)")  # with a number
_SAID = re.compile(r"answer is(?!\s*:)", re.IGNORECASE)


def extract(text: str) -> str | None:
    """The answer that a solution ends with, as it is written there; None if there is none.

    The first of these that is there: what follows the last `The answer is:`, what follows the
    first `####`, the contents of the last `\\boxed{}`, what follows the last `answer is`, the last
    number. (Where several `####` are there, as in headings, it is the first with a number.)

    The first is all that MetaMath's evaluation looks for (arXiv 2309.12284, its eval_gsm8k.py and
    eval_math.py); `####` is read as GSM8K's authors and lm-evaluation-harness do; the others let
    models be scored that were trained on neither.

    Example:
        >>> extract("1 + 1 = 2.\\nThe answer is: $2$."), extract("so \\\\boxed{\\\\frac{1}{2}}.")
        ('2', '\\\\frac{1}{2}')
        >>> extract("He has 3 and 4, so 1,007 in all."), extract("I do not know.")
        ('1,007', None)
    """
    return final(text) or _after(_SAID, text) or last_number(text)


def final(text: str) -> str | None:
    """`extract`, but only where the text marks an answer as such.

    Example:
        >>> final("He has 3 and 4."), final("He has 3 and 4.\\n#### 7")
        (None, '7')
    """
    return _after(_METAMATH, text) or _after_hashes(text) or boxed(text)


def boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{}` or `\fbox{}`, or what follows one without braces.

    Example:
        >>> boxed(r"$\boxed{1}$, no, $\boxed{\{x : x > \frac{1}{2}\}}$.")
        '\\{x : x > \\frac{1}{2}\\}'
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    rest = text[starts[-1] :]
    if not rest.startswith("{"):
        return bare(re.split(r"[\s$]", rest, maxsplit=1)[0]) or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return rest[1 : match.start()].strip() or None
    return None


def first_number(text: str) -> str | None:
    """The first number of a text, e.g. of an answer with its unit.

    Example:
        >>> first_number("-$1,250.50 a year"), first_number("3/4 of 8"), first_number("none")
        ('-1,250.50', '3/4', None)
    """
    return next(numbers.numbers(text), None)


def last_number(text: str) -> str | None:
    """The last number of a text."""
    return next(reversed(list(numbers.numbers(text))), None)


def _after(pattern: re.Pattern[str], text: str) -> str | None:
    """What follows the last match."""
    starts = [match.end() for match in pattern.finditer(text)]
    return _answer(text[starts[-1] :]) if starts else None


def _after_hashes(text: str) -> str | None:
    """What follows the first `####` that a number follows; without such, the last."""
    found = [_answer(part) for part in _GSM8K.split(text)[1:]]
    return next((a for a in found if a and _BEGINS.match(a)), found[-1] if found else None)


def _answer(text: str) -> str | None:
    """The answer that a text begins with: a sentence, or a line and what of it is still open."""
    answer = re.split(r"\.\s", _statement(text), maxsplit=1)[0]
    return boxed(answer) or bare(answer) or None


def _statement(text: str) -> str:
    """The first line, and further ones as long as a brace or an environment is open."""
    lines = text.strip().split("\n")
    braces = environments = 0
    for count, line in enumerate(lines, start=1):
        braces += line.count("{") - line.count("}")
        environments += line.count("\\begin") - line.count("\\end")
        if not braces and not environments:
            return "\n".join(lines[:count])
    return lines[0]


def bare(answer: str) -> str:
    r"""Without white space, a full stop, and signs of mathematics around it.

    Example:
        >>> bare(r" $\frac{1}{2}$. "), bare(r"\(x\)"), bare("$5"), bare(r"\$5")
        ('\\frac{1}{2}', 'x', '5', '\\$5')
    """
    text = answer.strip().removesuffix(".").strip()
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right):
            text = text[2:-2].strip()
    return re.sub(r"(?<!\\)\$", "", text).strip().removesuffix(".").strip()


_SUBSTITUTIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\s*\{ [^{}]*\}$", ""),  # a unit at the end, as MATH writes it
        (r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\(?:left|right|displaystyle)(?![a-z])", ""),
        (r"(?<!\\)\\[!,;: ]|~|\s", ""),
        (r"\^\{?\\circ\}?|\\degree|°", ""),
        (r"\\?[%$]", ""),
        (r"−", "-"),
        (r"\{,\}", ","),
        (r"^[A-Za-z]=(?=.)", ""),  # x = 5
        (r"^(-?)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3"),
    )
]


def normalise(answer: str) -> str:
    r"""One spelling of an answer: without units, space, layout, `$`, `%` and degrees.

    Example:
        >>> [normalise(a) for a in (r"\left( 1,\, \dfrac12 \right)", "x = 1,000", r"5\text{ cm}")]
        ['(1,\\frac{1}{2})', '1000', '5']
    """
    text = bare(answer)
    if (spelled := numbers.plain(text)) is not None:
        return spelled.replace(",", "")
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    spelled = numbers.plain(text)
    return text if spelled is None else spelled.replace(",", "")


def number(answer: str) -> Fraction | None:
    r"""The value of an answer that is a plain number, exactly; None if it is none.

    Example:
        >>> number("0.5") == number("1/2") == number(r"\frac12"), number("x"), number("1/0")
        (True, None, None)
    """
    return numbers.value(normalise(answer))


def equal(reference: str, answer: str) -> bool:
    """Whether two answers are spelled the same once normalised, or are the same number."""
    if normalise(reference) == normalise(answer) != "":
        return True
    value = number(reference)
    return value is not None and value == number(answer)
