"""What a number is: every common way of writing one is read back, and what is none is not."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.tasks.arithmetic import answer_of, same
from fedex_lora.tasks.numbers import numbers, plain, value

WAYS = {  # of setting off thousands
    "none": "",
    "comma": ",",
    "LaTeX comma": "{,}",
    "LaTeX comma in text": r"\text{,}",
    "LaTeX comma without space": r",\!",
    "LaTeX comma between": r"\!,\!",
    "LaTeX thin space": r"\,",
    "LaTeX thin space in braces": r"{\,}",
    "LaTeX medium space": r"\;",
    "LaTeX space": r"\ ",
    "LaTeX tie": "~",
    "no-break space": "\u00a0",
    "thin space": "\u2009",
    "narrow no-break space": "\u202f",
    "Swiss": "'",
    "Swiss, typographic": "’",
    "Python": "_",
}
MINUS = ("-", "−", "–", "—", "‑", "－", "- ", "− ", "– ", r"-\,", "{-}")
CURRENCY = ("", "$", r"\$", "€", "£")
PLACES = (
    "The answer is: {}",
    "The answer is: {}.",
    "The answer is: ${}$.",
    "The answer is: {} apples and 17 pears.",
    r"Adding 4 and 5 gives \boxed{{{}}}.",
    r"so $\boxed{{ {} }}$",
    "Adding 4 and 5 gives it.\n#### {}",
    "#### {}\n\nQuestion: 4 + 5?\n#### 9",
    "#### {}\n\nQ: 4 + 5?\nThe answer is: 9",
    "#### {}\nThen 4 + 5 is\n#### 9",
    "Hence the answer is {} in all.",
    "4 + 5 and 17 pears make {}",
    "**{}**",
)


def grouped(digits: str, gap: str) -> str:
    head = len(digits) % 3 or 3
    return gap.join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])


@given(
    st.integers(0, 10**13),
    st.sampled_from([*WAYS.values()]),
    st.sampled_from(["", ".5", ".25", ".00"]),
    st.sampled_from(["", *MINUS]),
    st.sampled_from(CURRENCY),
    st.booleans(),
    st.sampled_from(PLACES),
)
def test_a_number_written_in_any_common_way_is_read_back(
    whole, gap, decimals, minus, currency, sign_first, place
):
    number = grouped(str(whole), gap) + decimals
    before = minus + currency if sign_first or minus.strip() != minus else currency + minus
    if place.startswith("4 +") and minus == "- ":
        minus = before = "-"  # of a hyphen between words it takes a marked answer to know
    if place.startswith("4 +") and minus == "– ":
        minus = before = "–"
    expected = Fraction(f"{whole}{decimals}") * (-1 if minus else 1)
    found = answer_of("gsm8k", place.format(before + number))
    assert found is not None and value(found) == expected
    exact = str(expected) if expected.denominator > 1 else str(expected.numerator)
    assert same([(exact, found)], "string") == [True]
    assert same([(exact, before + number)], "string") == [True]


@given(st.integers(1, 99), st.integers(1, 98), st.integers(1, 99), st.sampled_from(["", "-", "−"]))
def test_fractions(of, above, below, minus):
    sign = -1 if minus else 1
    latex = rf"\frac{{{above}}}{{{below}}}"
    for text in (f"{above}/{below}", latex, latex.replace("frac", "dfrac"), f"${latex}$"):
        found = answer_of("gsm8k", f"The answer is: {minus}{text}")
        assert found is not None and value(found) == sign * Fraction(above, below)
    if above < below:
        for text in (f"{of} {above}/{below}", f"{of}{latex}", f"{of} {latex}"):
            found = answer_of("gsm8k", f"The answer is: {minus}{text}")
            assert found is not None and value(found) == sign * (of + Fraction(above, below))


@pytest.mark.parametrize(
    "text, found",
    [
        ("1½ of ¾", ["3/2", "3/4"]),
        ("12,34,567 rupees", ["12,34,567"]),
        ("1.234.567 and 1.234,56 and 1.234", ["1,234,567", "1,234.56", "1.234"]),
        ("１２３,４５６", ["123,456"]),
        ("+5, ＋6 and .5", ["5", "6", ".5"]),
        ("5-3, 5 - 3, 5 − 3, 10–12, (4)-1, 7% - 2", [*"535353", "10", "12", *"4172"]),
        ("COVID-19 x-2", ["19", "2"]),
        ("x − 3 = -2", ["3", "-2"]),
        ("a loss of − 3", ["-3"]),
        ("they lost – 3 of them", ["3"]),
        ("x = - 3, y: – 4, ( − 5)", ["-3", "-4", "-5"]),
        ("- 3 apples\n- 4 pears\n− 5", ["-3", "4", "-5"]),
        ("1, 2,3 and 10,20", ["1", "2", "3", "10", "20"]),
        ("1 234", ["1", "234"]),
        ("1.5e3", ["1.5", "3"]),
        ("0,500", ["0", "500"]),
        ("12 6/3", ["12", "6/3"]),
        ("20% of $1,000.00.", ["20", "1,000.00"]),
        (r"\frac{9{,}500}{2} \frac12 \cfrac1{10}", ["9,500/2", "1/2", "1/10"]),
        (r"1\!000\,000", ["1,000,000"]),
        ("none", []),
    ],
)
def test_numbers_of_a_text(text, found):
    assert list(numbers(text)) == found


def test_what_is_one_number_and_what_is_not():
    assert [plain(t) for t in ("", "x", "1,2", "3 4", "1:2", "2^3", "5 cm", "1/2/3")] == [None] * 8
    assert value("1/0") is None and value("9" * 5000) is None
    assert value("1 1/0") is None and value(f"1 1/{'9' * 5000}") is None


# What the common harnesses take: lm-evaluation-harness' strict match of gsm8k, and MetaMath's.
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
METAMATH = re.compile(r"[\-+]?\d*[\.,/]?\d+")


@given(
    st.lists(st.integers(-999, 10**6), min_size=1, max_size=3),
    st.sampled_from([" + ", " - ", " = ", " * ", " ", "e3 ", " / ", "\n\nQuestion: 1+1?\n#### "]),
    st.sampled_from(["{}", "{:,}", "{}.50"]),
)
def test_sums_spaces_exponents_and_further_questions_as_the_harnesses_read_them(ns, between, form):
    said = between.join(form.format(n) for n in ns)
    strict = STRICT.search(f"#### {said}")
    assert strict is not None
    found = value(answer_of("gsm8k", f"Well.\n#### {said}") or "")
    assert found == Fraction(strict[1].replace(",", ""))
    if form == "{}" and "e" not in between:
        first = METAMATH.search(said.partition("Question:")[0])
        assert first is not None
        assert value(answer_of("gsm8k", f"The answer is: {said}") or "") == int(first[0])


@pytest.mark.parametrize("text", ["1" * 10**6, "-" * 10**6, "- 1\n" * 10**5, r"\frac{" * 10**5])
def test_long_texts_take_no_long_time(text):
    assert all(len(n) <= 10**6 for n in numbers(text))
