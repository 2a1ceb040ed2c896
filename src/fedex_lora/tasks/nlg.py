"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts with several references each, equal to what the
E2E NLG Challenge's own scorer (github.com/tuetschek/e2e-metrics) gives."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fedex_lora.errors import check_installed
from fedex_lora.tasks import nlg_ptb

logger = logging.getLogger(__name__)

Ngram = tuple[str, ...]
References = Sequence[Sequence[str]]  # of each text

LONGEST = 5  # n-gram of NIST
_BETA = math.log(0.5) / math.log(1.5) ** 2  # a text 2/3 as long as its references counts half


@dataclass(frozen=True)
class Scores:
    """The scores of all texts together by metric, and of each text where a metric has them."""

    total: dict[str, float]
    rows: list[dict[str, float]]


def score(predictions: Sequence[str], references: References) -> Scores:
    """All five; BLEU and NIST alone where there is no Java, which the others need.

    Args:
        predictions: The texts, at least one.
        references: Of each text, at least one.

    Raises:
        UserError: The scorers are not installed.
    """
    assert len(predictions) == len(references) > 0 and all(references)
    require()
    total = {"BLEU": bleu(predictions, references), "NIST": nist(predictions, references)}
    if not has_java():
        return Scores(total, [{} for _ in predictions])
    by_metric = nlg_ptb.score(predictions, references)
    total |= {name: found.total for name, found in by_metric.items()}
    rows = [{name: m.rows[i] for name, m in by_metric.items()} for i in range(len(predictions))]
    return Scores(total, rows)


def require() -> None:
    """Raises a `UserError` if the packages of the extra `scorers` are not installed."""
    for package in ("sacrebleu", "pycocoevalcap"):
        check_installed(package, "task.generate: scoring texts", "or set task.generate: false")


@cache
def has_java() -> bool:
    """Whether there is a Java that runs; says so once if not."""
    if nlg_ptb.java_runs():
        return True
    logger.warning(
        "no Java that runs: METEOR, ROUGE_L and CIDEr are left out; install a Java runtime"
    )
    return False


def bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU-4 of the corpus, 0 to 1, on small letters and mteval's tokens, not smoothed.

    Source: Papineni et al. 2002; computed by sacrebleu.
    """
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415 - optional

    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    return metric.corpus_score(predictions, streams).score / 100  # pyright: ignore


def nist(predictions: Sequence[str], references: References) -> float:
    """NIST-5 of the corpus, on small letters and mteval's tokens.

        NIST = BP · Σₙ (Σ info(w₁…wₙ) over the n-grams that match) / (number of n-grams)
        info(w₁…wₙ) = log₂(count(w₁…wₙ₋₁) / count(w₁…wₙ)), counted in all references
        BP = exp(β·log²(min(1, L / L̄))),  β such that BP = ½ at L = ⅔·L̄

    where L is the number of words of all texts and L̄ that of their references, the mean taken
    over the references of each text. An n-gram matches as often as in the reference that has it
    most often.

    Source: Doddington 2002, eq. 2-4; mteval-v13a.pl.
    """
    texts, wanted = _tokenised(predictions), [_tokenised(texts) for texts in references]
    news = _news([text for texts in wanted for text in texts])
    gained, number = [0.0] * LONGEST, [0] * LONGEST
    for text, candidates in zip(texts, wanted, strict=True):
        for n in range(1, LONGEST + 1):
            matched = _ngrams(text, n) & _most([_ngrams(c, n) for c in candidates])
            gained[n - 1] += sum(count * news(ngram) for ngram, count in matched.items())
            number[n - 1] += max(0, len(text) - n + 1)
    length = sum(sum(map(len, texts)) / len(texts) for texts in wanted)
    return _brevity(number[0], length) * sum(g / m for g, m in zip(gained, number) if m)


def _news(texts: Sequence[Sequence[str]]) -> Callable[[Ngram], float]:
    """info(w₁…wₙ) in bits."""
    counts: Counter[Ngram] = Counter({(): sum(map(len, texts))})
    for text in texts:
        for n in range(1, LONGEST + 1):
            counts.update(_ngrams(text, n))
    return lambda ngram: math.log2(counts[ngram[:-1]] / counts[ngram])


def _most(counts: Sequence[Counter[Ngram]]) -> Counter[Ngram]:
    """Of each n-gram its largest count."""
    most: Counter[Ngram] = Counter()
    for count in counts:
        most |= count
    return most


def _ngrams(tokens: Sequence[str], n: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _brevity(length: int, wanted: float) -> float:
    if length == 0 or wanted == 0:
        return 0.0
    return math.exp(_BETA * math.log(min(1, length / wanted)) ** 2)


def _tokenised(texts: Sequence[str]) -> list[list[str]]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # noqa: PLC0415 - optional

    tokenizer = Tokenizer13a()
    return [tokenizer(text.lower()).split() for text in texts]
