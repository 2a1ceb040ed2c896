"""What is learned, and from which rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from fedex_lora.recipe.part import LocalPath, Part, Problem, did_you_mean, listed

_PAIR = ("sentence1", "sentence2")
GLUE_TEXTS: dict[str, tuple[str, ...]] = {  # its tasks, and their columns of texts
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": _PAIR,
    "qqp": ("question1", "question2"),
    "stsb": _PAIR,
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": _PAIR,
    "wnli": _PAIR,
}
COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
_TASK_FIELDS: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # kind: (needed, optional)
    "glue": (["name"], ["columns"]),
    "text-classification": ([], ["labels", "text_column", "text_pair_column", "label_column"]),
    "causal-lm": ([], ["text_column"]),
    "instruction": (["prompt", "response"], ["max_new_tokens", "generate"]),
    "e2e": ([], ["columns", "max_new_tokens", "generate", "num_beams"]),
    "math": ([], ["name", "columns", "max_new_tokens", "generate", "compare"]),
    "commonsense": ([], ["name", "columns", "max_new_tokens", "generate", "score"]),
    "image-classification": ([], ["labels", "image_column", "label_column"]),
}
_COLUMNS: dict[str, Sequence[str]] = {  # kind: what `columns` may name, beside GLUE's
    "e2e": ("meaning_representation", "human_reference"),
    "math": ("query", "response", "question", "problem", "solution", "answer"),
    "commonsense": ("instruction", "input", "output", "answer"),
}
GLUE = tuple(GLUE_TEXTS)
TASK_NAMES: dict[str, Sequence[str]] = {  # kind: the values of `name`
    "glue": GLUE,
    "math": ("metamath", "gsm8k", "math"),
    "commonsense": COMMONSENSE,
}


LABELLED = ("text-classification", "image-classification")  # by classes of the user's own


class TaskSpec(Part):
    kind: Literal[
        "glue",
        "text-classification",
        "causal-lm",
        "instruction",
        "e2e",
        "math",
        "commonsense",
        "image-classification",
    ]
    name: str | None = None  # which of a kind's data sets: see TASK_NAMES
    max_length: int = Field(default=128, ge=4)
    evaluation_max_length: int | None = Field(default=None, ge=4)  # max_length if not given
    columns: dict[str, str] = Field(default={})  # the task's name of a column: the rows' own name
    labels: list[str] | None = None  # classification: the agreed label set, in order
    text_column: str | None = None  # text-classification, causal-lm
    text_pair_column: str | None = None
    label_column: str = "label"
    prompt: str | None = None  # instruction: template with {column} fields
    response: str | None = None  # instruction: template of the response
    max_new_tokens: int = Field(default=64, ge=1)
    generate: bool = False  # score what is generated, not the loss alone
    num_beams: int = Field(default=10, ge=1)  # e2e: 10 in the paper
    compare: Literal["latex", "string"] = "latex"  # math: how two answers are compared
    score: Literal["generation", "likelihood"] = "generation"  # commonsense: how it answers
    image_column: str | None = None  # image-classification

    @property
    def evaluated_length(self) -> int:
        """The `max_length` of rows that models are scored on."""
        return self.evaluation_max_length or self.max_length

    def problems(self) -> Iterator[Problem]:
        needed, optional = _TASK_FIELDS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                yield name, f"missing; a task of kind {self.kind} needs it"
        for name, field in type(self).model_fields.items():
            fits = name in ("kind", *needed, *optional)
            fits |= name.endswith("max_length") and self.kind != "image-classification"
            if not fits and getattr(self, name) != field.default:
                yield name, f"a task of kind {self.kind} does not use it"
        names = TASK_NAMES.get(self.kind)
        if names and self.name is not None and self.name not in names:
            yield "name", f"expected one of {listed(names)}" + did_you_mean(self.name, names)
        known = _COLUMNS.get(self.kind) or (*GLUE_TEXTS.get(self.name or "", ()), "label")
        for column in self.columns if "columns" in optional else []:
            if column not in known:
                near = did_you_mean(column, known)
                yield f"columns.{column}", f"expected one of {listed(known)}{near}"
        if len(set(self.columns.values())) < len(self.columns):
            yield "columns", "two of them name the same column"
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            yield "labels", "expected two or more labels, all different"
        if self.score == "likelihood" and self.generate:
            yield "generate", "with `score: likelihood` nothing is generated; leave it out"


class DataSpec(Part):
    """Exactly one of name (hub), path (directory), clients (a file each), source (built in)."""

    name: str | None = None
    config: str | None = None
    revision: str | None = None
    path: LocalPath | None = None
    clients: list[LocalPath] | None = (
        None  # with path: the server's evaluation rows come from there
    )
    source: Literal["stdlib-docs", "digits"] | None = None
    evaluation: dict[str, str] = Field(
        default={}
    )  # further evaluation splits: a file, or NAME[:CONFIG][@SPLIT]
    train_examples: int | None = Field(default=None, ge=1)  # a seeded sample of the training rows
    evaluation_examples: int | None = Field(default=None, ge=1)  # of each evaluation split

    def problems(self) -> Iterator[Problem]:
        given = {k for k in ("name", "path", "clients", "source") if getattr(self, k) is not None}
        if len(given) != 1 and given != {"clients", "path"}:
            got = listed(sorted(given)) or "none"
            sources = "name, path, clients, source (or clients with path)"
            yield "", f"expected exactly one of {sources}, got {got}"
        if self.clients is not None and len(set(self.clients)) < max(1, len(self.clients)):
            yield "clients", "expected one or more files, all different"
        for option in ("config", "revision"):
            if getattr(self, option) is not None and self.name is None:
                yield option, "only a data set of the hub (`name`) has one"
