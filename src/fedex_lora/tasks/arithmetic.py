"""Answers to arithmetic: which one an output gives, and whether it is the reference."""

from __future__ import annotations

from collections.abc import Sequence

from fedex_lora.tasks import answers, latex

# Where a model that goes on to the next problem stops answering this one: the stop words of
# MetaMath's evaluation, and those of lm-evaluation-harness at the beginning of a line.
_STOPS = ("Question:", "USER:", "ASSISTANT:", "Instruction:", "Response:", "\nQ:", "\nProblem:")


def answer_of(form: str, output: str) -> str | None:
    """The final answer in an output, as rows of that data set are answered.

    Example:
        >>> answer_of("gsm8k", "The answer is: 5 apples."), answer_of("math", "so \\\\boxed{x^2}")
        ('5', 'x^2')
    """
    text = output
    for stop in _STOPS:
        text = text.partition(stop)[0]
    answer = answers.extract(text)
    if form == "gsm8k" and answer is not None:
        return answers.first_number(answer) or answers.last_number(text)
    return answer


def same(pairs: Sequence[tuple[str, str | None]], compare: str) -> list[bool]:
    """Whether each answer is the reference; math-verify is asked only where spelling differs."""
    right = [answer is not None and answers.equal(ref, answer) for ref, answer in pairs]
    if compare == "latex":
        unclear = [i for i, (_, answer) in enumerate(pairs) if answer and not right[i]]
        asked = [(answers.bare(pairs[i][0]), answers.bare(pairs[i][1] or "")) for i in unclear]
        for i, verdict in zip(unclear, latex.equal_latex(asked)):
            right[i] = verdict
    return right
