"""METEOR, ROUGE-L and CIDEr on the tokens of the Penn Treebank (pycocoevalcap and its Java)."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from fedex_lora.errors import UserError, Withheld

_JAVA = ["java", "-Dfile.encoding=UTF-8"]  # whatever the locale says


@dataclass(frozen=True)
class Metric:
    """The score of all texts together and of each."""

    total: float
    rows: list[float]


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """`METEOR`, `ROUGE_L` and `CIDEr` of texts with one or more references each."""
    flat = [text for texts in references for text in texts]
    tokens = iter(tokenise([*predictions, *flat]))
    texts = [next(tokens) for _ in predictions]
    wanted = [[next(tokens) for _ in these] for these in references]
    return {
        "METEOR": meteor(texts, wanted),
        "ROUGE_L": rouge_l(texts, wanted),
        "CIDEr": cider(texts, wanted),
    }


def java_runs() -> bool:
    """Whether there is a Java that starts."""
    try:
        return subprocess.run([*_JAVA, "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def tokenise(texts: Sequence[str]) -> list[str]:
    """Each text in small letters, its tokens separated by spaces, without punctuation.

    Raises:
        UserError: Java does not do it.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # noqa: PLC0415 - optional

    lines = "\n".join(" ".join(text.split()) for text in texts)  # no other ends of lines
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    tokenizer = "edu.stanford.nlp.process.PTBTokenizer"
    command = [*_JAVA, "-cp", str(jar), tokenizer, "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=lines.encode(), capture_output=True)
    if done.returncode:
        raise _failed("the tokenizer", done.stderr)
    found = done.stdout.decode().split("\n")
    assert len(found) == len(texts), "the tokenizer lost or made lines"
    return [" ".join(w for w in line.split() if w not in PUNCTUATIONS) for line in found]


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """ROUGE-L of tokenised texts: F with β = 1.2 of the longest common subsequence.

    Source: Lin 2004, eq. 2-4; computed by pycocoevalcap.
    """
    from pycocoevalcap.rouge.rouge import Rouge  # noqa: PLC0415 - optional

    return _pycoco(Rouge().compute_score, texts, references)


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """CIDEr-D of tokenised texts; the weights of n-grams come from these references.

    Source: Vedantam et al. 2015, sections 4 and 6; computed by pycocoevalcap.
    """
    from pycocoevalcap.cider.cider import Cider  # noqa: PLC0415 - optional

    if not any(any(these) for these in references):  # it would look for the commonest of no words
        return Metric(0.0, [0.0 for _ in texts])
    return _pycoco(Cider().compute_score, texts, references)


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """METEOR 1.5 of tokenised English texts.

    Source: Denkowski and Lavie 2014; computed by their program, which pycocoevalcap carries.

    Raises:
        UserError: Java does not do it.
    """
    with _meteor() as ask:
        # each text's statistics first, then the scores of all of them
        known = [ask(_statistics_of(t, r)) for t, r in zip(texts, references, strict=True)]
        first = float(ask(" ||| ".join(["EVAL", *known])))
        *rows, total = [first, *(float(ask(None)) for _ in texts)]
    return Metric(total, rows)


@contextmanager
def _meteor() -> Iterator[Callable[[str | None], str]]:
    """A function that hands METEOR a line, if any, and returns its next one."""
    jar = _package() / "meteor" / "meteor-1.5.jar"
    command = [*_JAVA, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors) as process,
    ):
        assert process.stdin and process.stdout
        try:
            yield partial(_ask, process.stdin, process.stdout, errors)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # of what a dead process did not take
                process.stdin.close()


def _ask(stdin: IO[bytes], stdout: IO[bytes], errors: IO[bytes], line: str | None) -> str:
    answer = b""
    with suppress(BrokenPipeError):
        if line is not None:
            stdin.write(f"{line}\n".encode())
            stdin.flush()
        answer = stdout.readline()
    if not answer:
        errors.seek(0)
        raise _failed("METEOR", errors.read())
    return answer.decode().strip()


def _failed(what: str, errors: bytes) -> UserError:
    lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
    return Withheld(
        f"task.generate: {what}, a program in Java, ended while texts were scored: {lines[-1]}. It "
        "needs Java 8 or later and 2 GB of free memory; without any Java the scores that need it "
        "are left out"
    )


def _statistics_of(text: str, references: Sequence[str]) -> str:
    """The question for a text's statistics; `|||` separates, so it is in no text."""
    return " ||| ".join(part.replace("|||", "") for part in ["SCORE", *references, text])


def _pycoco(
    compute: Callable[..., Any], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> Metric:
    wanted: Mapping[int, list[str]] = {i: list(these) for i, these in enumerate(references)}
    total, rows = compute(wanted, {i: [text] for i, text in enumerate(texts)})
    return Metric(float(total), [float(row) for row in rows])


def _package() -> Path:
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
