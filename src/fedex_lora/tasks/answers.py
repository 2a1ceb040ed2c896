"""Final answers of worked solutions: where they stand in a text, and when two are the same."""

from __future__ import annotations

import re
from fractions import Fraction

_MARKED = (
    re.compile(r"the answer is\s*:", re.IGNORECASE),  # MetaMathQA
    re.compile("####"),  # GSM8K
)
_BOXED = re.compile(r"\\f?box(?:ed)?(?![a-z])\s*")
_SAID = re.compile(r"answer is(?!\s*:)", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")


def extract(text: str) -> str | None:
    """The answer that a solution ends with, as it is written there; None if there is none.

    The first of these that is there, each where it stands last: what follows `The answer is:`,
    what follows `####`, the contents of `\\boxed{}`, what follows `answer is`, a number.

    The first is all that MetaMath's evaluation looks for (arXiv 2309.12284, its eval_gsm8k.py and
    eval_math.py); the others let models be scored that were not trained on it.

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
    marked = (_after(pattern, text) for pattern in _MARKED)
    return next((answer for answer in marked if answer), None) or boxed(text)


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
    return next(iter(_numbers(text)), None)


def last_number(text: str) -> str | None:
    """The last number of a text."""
    return next(reversed(_numbers(text)), None)


def _numbers(text: str) -> list[str]:
    return [number.rstrip(",") for number in _NUMBER.findall(text.replace("$", ""))]


def _after(pattern: re.Pattern[str], text: str) -> str | None:
    starts = [match.end() for match in pattern.finditer(text)]
    if not starts:
        return None
    answer = re.split(r"\.\s", _statement(text[starts[-1] :]), maxsplit=1)[0]
    return boxed(answer) or bare(answer) or None


def _statement(text: str) -> str:
    """The first line, and further ones as long as a brace or an environment is open."""
    lines = text.strip().split("\n")
    for count in range(1, len(lines) + 1):
        part = "\n".join(lines[:count])
        if part.count("{") == part.count("}") and part.count("\\begin") == part.count("\\end"):
            return part
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
        (r"^(-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?)$", lambda m: m.group().replace(",", "")),
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
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return text


_RATIONAL = re.compile(r"[-+]?(?:[0-9]{1,100}(?:\.[0-9]{0,100})?|\.[0-9]{1,100})(?:/[0-9]{1,100})?")


def number(answer: str) -> Fraction | None:
    r"""The value of an answer that is a plain number, exactly; None if it is none.

    Example:
        >>> number("0.5") == number("1/2") == number(r"\frac12"), number("x"), number("1/0")
        (True, None, None)
    """
    text = normalise(answer)
    if not _RATIONAL.fullmatch(text):
        return None
    above, _, below = text.partition("/")
    return Fraction(above) / Fraction(below or "1") if below.strip("0") or not below else None


def equal(reference: str, answer: str) -> bool:
    """Whether two answers are spelled the same once normalised, or are the same number."""
    if normalise(reference) == normalise(answer) != "":
        return True
    value = number(reference)
    return value is not None and value == number(answer)
