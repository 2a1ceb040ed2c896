"""The E2E NLG Challenge: a sentence about a restaurant from its attributes.

Novikova et al. 2017, arXiv 1706.09254; with GPT-2 and LoRA: Hu et al., arXiv 2106.09685, section
5.4 and appendix D.3; federated: arXiv 2410.09432, section 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from fedex_lora.errors import shown
from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks import nlg
from fedex_lora.tasks.base import LineOf, Task, blanked, check_columns, one_based, refuse_first
from fedex_lora.tasks.generation import Decoding, verdicts
from fedex_lora.tasks.language import evaluate_loss, language_task
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, nn
from fedex_lora.tasks.metrics import SHARE, Metric
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.prompted import answered, check_room, evaluation_rows, training_rows

MEANING, REFERENCE = "meaning_representation", "human_reference"

METRICS: Mapping[str, Metric] = {
    **dict.fromkeys(("BLEU", "METEOR", "ROUGE_L"), SHARE),
    "NIST": Metric(range=(0.0, 100.0)),
    "CIDEr": Metric(range=(0.0, 10.0)),
}

LENGTH_PENALTY = 0.9
NO_REPEAT_NGRAM = 4


class E2E(TaskSpec):
    """Putting meaning representations into words.

    The prompt is the meaning representation, `linearised`, and ` ||`; the loss is over a space,
    the reference, and the end-of-text token. Training rows longer than `max_length` are left out.

    `loss` and `perplexity` are over all evaluation rows. With `generate`, one text is generated
    for each meaning representation, by beam search with length penalty 0.9 and without repeated
    4-grams (table 11 of Hu et al.), and scored against all references that the evaluation rows
    have for it: `BLEU`, `NIST`, `METEOR`, `ROUGE_L` and `CIDEr` of `nlg.score`. A sample of the
    rows (`data.evaluation_examples`) therefore also means fewer references each.
    """

    scored: ClassVar[Mapping[str, Any]] = {"generate": True}

    max_new_tokens: int = Field(default=64, ge=1, le=10**7)
    generate: bool = False  # generate texts when evaluating; else there is the loss alone
    num_beams: int = Field(default=10, ge=1, le=10**4)  # 10 in the paper

    def renamable(self) -> Sequence[str]:
        return MEANING, REFERENCE

    def build(self, labels: Sequence[str] | None) -> Task:
        decoding = Decoding(self.max_new_tokens, self.num_beams, LENGTH_PENALTY, NO_REPEAT_NGRAM)
        return language_task(
            "e2e",
            (MEANING, REFERENCE),
            METRICS if self.generate else {},
            check=partial(_check, self.generate),
            encode=_encode,
            encode_evaluation=_encode_evaluation,
            evaluate=partial(_evaluate, decoding) if self.generate else evaluate_loss,
            check_room=partial(check_room, self.max_new_tokens) if self.generate else None,
            decoding=decoding,
            blank=partial(blanked, columns=(MEANING,), answers={REFERENCE: "-"}),
        )


register_task("e2e", E2E)


def linearised(meaning: str) -> str | None:
    """A meaning representation as GPT-2 was given it (Hu et al.); None if it is none.

    Example:
        >>> linearised("name[Alimentum], area[city centre]")
        'name : Alimentum | area : city centre'
    """
    if not re.fullmatch(rf"{_SLOT}(,{_SLOT})*", meaning):
        return None
    slots = re.findall(r"([^\[\],]+)\[([^\[\]]+)\]", meaning)
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in slots)


_SLOT = r"[^\[\],]*[^\[\],\s]\s*\[[^\[\]]*[^\[\]\s]\s*\]\s*"


def _check(generating: bool, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    if generating:  # here, as this is the first that a run does, and exports do not
        nlg.require()
        nlg.has_java()
    check_columns(rows, (MEANING, REFERENCE), where)
    refuse_first(map(_problem, rows[MEANING], rows[REFERENCE]), where, line_of)


def _problem(meaning: Any, reference: Any) -> str | None:
    if not isinstance(meaning, str) or linearised(meaning) is None:
        return f"{MEANING} is {shown(meaning)}; expected name[Alimentum], area[...]."
    if not isinstance(reference, str) or not reference.strip():
        return f"{REFERENCE} is {shown(reference)}; expected a text."
    return None


def _pairs(rows: Dataset) -> tuple[list[str], list[str]]:
    """The prompts and the responses."""
    prompts = [f"{linearised(meaning)} ||" for meaning in rows[MEANING]]
    return prompts, [f" {reference.strip()}" for reference in rows[REFERENCE]]


def _encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    return training_rows(*_pairs(rows), tokenizer, max_length)


def _encode_evaluation(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    more = rows.select_columns([MEANING, REFERENCE]).to_list()
    return evaluation_rows(*_pairs(rows), more, tokenizer, max_length)


def _evaluate(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    loss = evaluate_loss(model, encoded, tokenizer, batch_size)
    groups = _rows_by_meaning(encoded)
    firsts = encoded.select([rows[0] for rows in groups])
    prompts, texts = answered(decoding, model, firsts, tokenizer, batch_size, outputs)
    known = encoded[REFERENCE][:]
    references = [[known[row] for row in rows] for rows in groups]
    scores = nlg.score([text.strip() for text in texts], references)
    if outputs:
        more = [{"references": r, "scores": s} for r, s in zip(references, scores.rows)]
        outputs.verdicts(verdicts(tokenizer, prompts, texts, more))
    return {**scores.total, **loss}


def _rows_by_meaning(encoded: Dataset) -> list[list[int]]:
    """The rows of each meaning representation, in the order of their first appearance."""
    groups: dict[str, list[int]] = {}
    for row, meaning in enumerate(encoded[MEANING]):
        groups.setdefault(meaning, []).append(row)
    return list(groups.values())
