"""Final answers: finding them in texts, and telling whether two are the same."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedex_lora.errors import UserError
from fedex_lora.tasks import answers, latex
from fedex_lora.tasks.answers import equal, extract
from fedex_lora.tasks.latex import equal_latex

MATRIX = "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"  # over two lines


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2 + 3 = 5.\nThe answer is: 5", "5"),
        ("The answer is: 4. No, wait.\nThe answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("The answer is: \\boxed{7}.\nI hope this helps.", "7"),
        ("So \\boxed{3}.\n#### 1,234\nQ: next?", "1,234"),
        ("#### -5", "-5"),
        ("#### 5\n\nNext: 2 + 4?\n#### 6", "5"),
        ("#### Step 1\n2 + 3 = 5\n#### Result\n#### $5$", "5"),
        ("#### so it is 5", "so it is 5"),
        ("First \\boxed{1}, finally $\\boxed{\\frac{\\sqrt{2}}{2}}$.", "\\frac{\\sqrt{2}}{2}"),
        ("$\\boxed{\\left\\{ 1, 2 \\right\\}}$", "\\left\\{ 1, 2 \\right\\}"),
        ("it is $\\fbox{4}$ or \\boxed 9 in all", "9"),
        (f"The answer is:\n{MATRIX}\nDone", MATRIX),
        ("Hence the answer is 18 dollars. Good.", "18 dollars"),
        ("She pays $3 and then $1,200.50.", "1,200.50"),
        ("\\boxed{1", "1"),  # no end: the last number
        ("The answer is: ", None),
        ("No idea.", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract(text) == answer


# reference, answer, the same by `equal`, the same by `equal_latex`
SAME = [
    (r"\frac{1}{2}", "0.5", True, True),
    (r"\frac12", r"\dfrac{1}{2}", True, True),
    ("1/2", r"\tfrac{1}{2}", True, True),
    (r"-\frac{1}{3}", r"\frac{-1}{3}", True, True),
    (r"1\frac{1}{2}", r"\frac{3}{2}", True, True),
    ("–3", "-3", True, False),
    ("0.333", r"\frac13", False, False),
    ("1,234,567", "$1234567$.", True, True),
    ("1{,}000", r"1,\!000", True, True),
    (r"90^\circ", "90", True, True),
    ("90", r"90^{\circ}", True, True),
    (r"50\%", "50", True, True),
    (r"50\%", "0.5", False, True),
    (r"\$18.90", "18.9", True, True),
    ("18", "18.00", True, True),
    ("-3", "-3.", True, True),
    ("-3", "3", False, False),
    (r"\text{Tuesday}", "Tuesday", True, True),
    (r"\text{Tuesday}", "Monday", False, False),
    (r"\text{(A)}", "A", False, True),
    (r"5\text{ cm}", "5", True, True),
    (r"5 \text{ cm}^2", "5", False, True),
    ("[0,1)", r"\left[0,\, 1\right)", True, True),
    ("[0,1)", "(0,1)", False, False),
    ("(1,2)", "(2,1)", False, False),
    (r"(-\infty,3)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,3)", False, True),
    (r"x \le 3", r"(-\infty,3]", False, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", False, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False, False),
    (r"\{1,2\}", r"\{2,1\}", False, True),
    ("1,2", "1", False, False),
    ("x=5", "5", True, True),
    ("x^2+2x+1", "(x+1)^2", False, True),
    ("x^2", "x^3", False, False),
    (r"2\sqrt{3}", r"\sqrt{12}", False, True),
    ("4+3i", "3i + 4", False, True),
    (r"\pi", "3.14159", False, False),
    (r"\frac{1}{0}", "1", False, False),
    ("3", r"\frac{", False, False),
    ("3", "1" * 5000, False, False),
    ("3", "", False, False),
]


def test_spelling_and_value():
    assert [equal(reference, answer) for reference, answer, *_ in SAME] == [s for *_, s, _ in SAME]


def test_the_same_in_mathematics():
    pytest.importorskip("math_verify")
    pairs = [(answers.bare(r), answers.bare(a)) for r, a, *_ in SAME]
    with ThreadPoolExecutor(1) as pool:  # where math-verify's own limits do not work
        found = pool.submit(equal_latex, pairs).result()
    assert dict(zip(SAME, found)) == {row: row[-1] for row in SAME}


def test_what_takes_too_long_is_given_up_and_what_follows_is_compared(caplog):
    pytest.importorskip("math_verify")
    tower = "9^{9^{9^9}}"
    found = equal_latex([("0.5", r"\frac12"), ("1", tower), ("2", r"\sqrt{4}")], seconds=3)
    assert found == [True, False, True]
    assert "gave up comparing '1' with '9^{9^{9^9}}' (limit: 3 s)" in caplog.text


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'fedex-lora\[scorers\]'"):
        equal_latex([("1", "2")])
    assert equal_latex([]) == []


def test_a_library_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    monkeypatch.setattr(latex, "check_installed", lambda *_: None)
    with pytest.raises(UserError, match="math-verify does not start"):
        equal_latex([("1", "2")])


def rows(shared, *names):
    found = []
    for name in names:
        file = shared / "data" / f"{name}.jsonl"
        if not file.is_file():
            pytest.skip(f"no {file}")
        found += [json.loads(line) for line in file.read_text().split("\n") if line]
    return found


def test_answers_of_published_solutions(shared):
    """In all 4181 solutions of MATH, and all 7473 of GSM8K, it is the published answer."""
    math = rows(shared, "math/test", "math/train")
    missed = [r for r in math if extract(r["solution"]) != r["answer"].strip()]
    assert len(math) == 4181 and missed == []
    gsm8k = rows(shared, "gsm8k/train")
    missed = [r for r in gsm8k if extract(r["answer"]) != r["answer"].split("#### ")[1]]
    assert len(gsm8k) == 7473 and missed == []
    assert all(answers.number(extract(r["answer"]) or "") is not None for r in gsm8k)
