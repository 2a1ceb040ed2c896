r"""What a number is, for all arithmetic tasks: found in a text, spelled plainly, and its value.

Thousands may be set off by `,`, by LaTeX's `{,}`, `\,` and `\!`, by no-break and thin spaces, by
`'` or `_`, in threes or as in India; 1.234.567 and 1.234,56 are the European way where no other
reading is left. Fractions are 3/4, `\frac{3}{4}`, 1 3/4, ½. A minus is a hyphen, U+2212 or a dash;
it is a sign unless something stands before it that it subtracts from, joins or itemises: 5-3,
COVID-19.

As in the common harnesses (lm-evaluation-harness, MetaMath's evaluation) a plain space ends a
number, and so does a comma before anything but three digits; 1.5e3 begins with 1.5.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_LONGEST = 200  # characters of a number that is computed with

_FOLDED = {ord(c): str(i) for i, c in enumerate("０１２３４５６７８９")}
_FOLDED |= {ord(c): plain for c, plain in zip("⁄∕－﹣＋，．", "//--+,.")}
_FOLDED |= {  # ½ and its like
    code: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("⁄"))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}

_THIN = "\u00a0\u2007\u2009\u202f"  # no-break and thin spaces
_COMMA = r",|\{\\?,\}|\\(?:text|mbox|mathrm|mathord)\{,\}"
_SPACING = rf"\\[,;: ]|~|\\thinspace(?![a-z])|[{_THIN}]"
_GAP = rf"(?:(?:\\!)*(?:{_COMMA}|{_SPACING}|['’_])(?:\\!)*|(?:\\!)+)"
_HEAD = r"(?<![0-9])(?<![0-9][.,])[1-9][0-9]{0,2}"  # before the first gap
_GROUPED = re.compile(rf"{_HEAD}(?:{_GAP}[0-9]{{3}})+(?![0-9])")
_EUROPEAN = re.compile(rf"{_HEAD}(?:(?:\.[0-9]{{3}})+,[0-9]+|(?:\.[0-9]{{3}}){{2,}})(?![.,]?[0-9])")

_WHOLE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9])"
_WHOLE += r"|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_OVER = rf"\\[dtc]?frac\s*(?:\{{\s*({_DECIMAL})\s*\}}|([0-9]))\s*(?:\{{\s*({_WHOLE})\s*\}}|([0-9]))"
_FRACTION = re.compile(rf"(?<![0-9]){_OVER}")
_MIXED = re.compile(rf"(?<=[0-9])\s*{_OVER}")

_MINUS = r"\-−–—‒‐‑"  # hyphen, minus, dashes
_NUMBER = re.compile(
    rf"""(?:\\?[$£€¥₹][ ]?)?
    (?:(?P<sign>\{{[+{_MINUS}]\}}|[+{_MINUS}])(?P<gap>(?:{_SPACING}|\\!|[ \t])*))?
    (?:\\?[$£€¥₹][ ]?)?
    (?:(?P<of>{_WHOLE})[ ](?P<over>[0-9]+)/(?P<under>[0-9]+)(?![0-9/])
    |(?P<plain>{_DECIMAL}(?:/{_WHOLE})?))""",
    re.VERBOSE,
)
_JOINED = re.compile(r"[\w)\]}%]\Z")  # right before a minus: 5-3, COVID-19
_OPERAND = re.compile(r"(?:[0-9)\]}%]|\b[A-Za-z])\s*\Z")  # before U+2212 and a space: x − 3
_OPENING = "=:([{$£€¥₹<>≤≥≈*"  # before a minus and a space: = - 3
_CONTEXT = 40  # characters before a minus that are looked at


def numbers(text: str) -> Iterator[str]:
    r"""The numbers of a text in order, each spelled plainly: `-1,234.5` or `-3/4`.

    Example:
        >>> list(numbers(r"from $-9{,}500$ to 1 234, 1.5e3, 5 - 3 and 2\frac{1}{2}"))
        ['-9,500', '1', '234', '1.5', '3', '5', '3', '5/2']
        >>> list(numbers("− 3 of 10–12")), list(numbers("- 3 apples\n- 4 pears"))
        (['-3', '10', '12'], ['-3', '4'])
    """
    text = _rewritten(text)
    for found in _NUMBER.finditer(text):
        if found["over"] and not _proper(found):  # 12 6/3 is two numbers
            yield _signed(text, found) + found["of"]
            yield f"{found['over']}/{found['under']}"
        else:
            yield _signed(text, found) + _unsigned(found)


def plain(text: str) -> str | None:
    r"""The plain spelling of a text that is one number and nothing else; None if it is not.

    Example:
        >>> plain(r"\$9{,}500"), plain("– 3"), plain("5 apples"), plain("1,2")
        ('9,500', '-3', None, None)
    """
    text = _rewritten(text.strip())
    found = _NUMBER.fullmatch(text)
    if found is None or (found["over"] and not _proper(found)):
        return None
    return _signed(text, found) + _unsigned(found)


def value(text: str) -> Fraction | None:
    r"""The value of a text that is one number and nothing else, exactly; None if it is not.

    Example:
        >>> value("1,000.50"), value(r"-\frac12"), value("1/0"), value("x")
        (Fraction(2001, 2), Fraction(-1, 2), None, None)
    """
    spelled = plain(text)
    if spelled is None or len(spelled) > _LONGEST:
        return None
    above, _, below = spelled.replace(",", "").partition("/")
    return Fraction(above) / Fraction(below or 1) if Fraction(below or 1) else None


def _rewritten(text: str) -> str:
    """Thousands set off by commas, decimals by a point, fractions as a/b."""
    text = text.translate(_FOLDED)
    text = _GROUPED.sub(lambda m: ",".join(re.findall("[0-9]+", m.group())), text)
    text = _EUROPEAN.sub(_point, text)
    text = _MIXED.sub(lambda m: f" {_over(m)}", text)
    return _FRACTION.sub(_over, text)


def _point(match: re.Match[str]) -> str:
    whole, comma, decimals = match.group().partition(",")
    return whole.replace(".", ",") + (f".{decimals}" if comma else "")


def _over(match: re.Match[str]) -> str:
    return f"{match[1] or match[2]}/{match[3] or match[4]}"


def _proper(found: re.Match[str]) -> bool:
    """Whether the fraction of a mixed number is below 1."""
    short = max(len(found[part]) for part in ("of", "over", "under")) < _LONGEST
    return short and int(found["over"]) < int(found["under"])


def _unsigned(found: re.Match[str]) -> str:
    if found["plain"] is not None:
        return found["plain"]
    over, under = int(found["over"]), int(found["under"])
    return f"{int(found['of'].replace(',', '')) * under + over}/{under}"


def _signed(text: str, found: re.Match[str]) -> str:
    """`-` if there is a minus that belongs to the number."""
    sign, gap, start = (found["sign"] or "+").strip("{}"), found["gap"], found.start()
    if sign == "+":
        return ""
    at = found.start("sign")
    before = text[max(0, at - _CONTEXT) : at].rpartition("\n")[2]
    if _JOINED.search(before):
        return ""
    if not re.search(r"[ \t]", gap.replace("\\ ", "")):
        return "-"
    if sign == "−" and before.strip():
        return "" if _OPERAND.search(before) else "-"
    if not before.strip():  # an item of a list, but for the very first
        first = start < _CONTEXT and not text[:start].strip()
        return "-" if first or sign == "−" else ""
    return "-" if before.rstrip()[-1] in _OPENING else ""
