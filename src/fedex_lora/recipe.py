"""Everything that determines a run, as values that are checked when they are made.

`fedex_lora.recipe_yaml` reads and writes them as YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedex_lora.errors import UserError
from fedex_lora.methods import METHODS, get_method
from fedex_lora.recipe_refused import REFUSED_TRAINING

Problem = tuple[str, str]  # dotted path within the block, what is wrong there
LocalPath = Annotated[Path, Field(strict=False)]  # YAML has no paths: text is one


class Part(BaseModel):
    """Base of all blocks: unknown keys are errors, values do not change after validation.

    Types are strict: `true` is no number and `3` is no text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """What is wrong with fields that are each fine by themselves."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> Self:
        _raise(self.problems())
        return self


def _raise(problems: Iterable[Problem]) -> None:
    found = list(problems)
    if found:
        text = "; ".join(f"{path}: {what}" for path, what in found)
        raise PydanticCustomError("fields", "{text}", {"text": text, "found": found})


def did_you_mean(wrong: object, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known name, or "" if none is near.

    Example:
        >>> did_you_mean("lerning_rate", ["learning_rate", "optim"])
        "; did you mean 'learning_rate'?"
    """
    near = difflib.get_close_matches(str(wrong), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class ModelSpec(Part):
    """The pretrained model: hub id, local path, or `package:NAME/FOLDER` of a Python package."""

    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    placement: Literal["fold", "side"] = "fold"
    quantisation: Literal["nf4", "fp4", "int8"] | None = None  # bitsandbytes; needs placement: side
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def problems(self) -> Iterator[Problem]:
        if self.quantisation and self.placement != "side":
            yield (
                "quantisation",
                "needs `placement: side`; folding would quantise the residual away",
            )


class LoraSpec(Part):
    """The fields of PEFT's LoraConfig that aggregation is exact for; any other is refused."""

    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: Literal[True, "gaussian"] = True
    bias: Literal["none"] = "none"
    init: LocalPath | None = None  # ours: start from this PEFT adapter
    ranks: list[int] | None = None  # ours: one rank a client, where the method allows it

    def problems(self) -> Iterator[Problem]:
        if self.ranks is not None and min(self.ranks, default=0) < 1:
            yield "ranks", "expected one rank of at least 1 for each client"
        for name, rank in self.rank_pattern.items():
            if rank < 1:
                yield f"rank_pattern.{name}", "expected a rank of at least 1"
        for name, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                yield f"alpha_pattern.{name}", "expected a number above 0"


class MethodSpec(Part):
    """A row of the methods table and its options."""

    name: str = "fedex"
    rank: int | None = Field(default=None, ge=0)  # r' of a truncated residual
    carry: bool = True  # keep what truncation cut off, and add it to the next residual
    flush: bool = True  # send what is still carried in the last round

    def problems(self) -> Iterator[Problem]:
        try:
            method = get_method(self.name)
        except UserError as error:
            yield "name", str(error).removeprefix("method.name: ")
            return
        truncated = method.residual == "truncated"
        if truncated and self.rank is None:
            yield "rank", f"missing; {self.name} needs the rank its residual is cut to"
        if self.rank is not None and not truncated:
            having = _names(name for name, m in METHODS.items() if m.residual == "truncated")
            yield "rank", f"{self.name} does not cut its residual; only {having} takes a rank"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


_PARTITION_NEEDS = {"iid": "", "dirichlet": "alpha", "shards": "shards_per_client", "by": "column"}


class PartitionSpec(Part):
    """How one data set is dealt out to the clients (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "shards", "by"] = "iid"
    alpha: float | None = Field(default=None, gt=0)  # dirichlet
    shards_per_client: int | None = Field(default=None, ge=1)  # shards
    column: str | None = (
        None  # by: a natural id; dirichlet, shards: split by this instead of labels
    )

    def problems(self) -> Iterator[Problem]:
        for kind, option in _PARTITION_NEEDS.items():
            if option and kind == self.kind and getattr(self, option) is None:
                yield option, f"missing; a partition of kind {kind} needs it"
        useless = {"alpha", "shards_per_client", "column"} - {_PARTITION_NEEDS[self.kind]}
        useless -= {"column"} if self.kind != "iid" else set()
        for option in sorted(useless):
            if getattr(self, option) is not None:
                yield option, f"a partition of kind {self.kind} does not use it"


CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a folder's name
CLIENT_NAME_RULE = "expected letters, digits, '.', '_', '-', at most 64, a letter or digit first"


class FederationSpec(Part):
    clients: int = Field(default=3, ge=1)
    rounds: int = Field(default=5, ge=1)
    clients_per_round: Literal["all"] | int | float = "all"
    weights: Literal["examples", "uniform"] = "examples"
    server_learning_rate: float = Field(default=1.0, gt=0)
    min_clients: int = Field(default=1, ge=1)
    failure_rate: float = Field(default=0.0, ge=0, le=1)
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    partition: PartitionSpec = PartitionSpec()
    max_norm: float | None = Field(default=None, gt=0)  # bound of an update's norm
    # across machines (engine flower):
    names: list[str] | None = None  # of the institutions; others are then refused
    round_timeout: float = Field(default=3600, gt=0)  # seconds until a round goes on without
    wait_for_clients: float = Field(default=600, ge=0)  # seconds, while there are too few
    oversample: float = Field(default=1.0, ge=1)  # ask so many times as many; the first win

    @property
    def sampled(self) -> int:
        """How many clients are taken in a round; a fraction is rounded, to at least one."""
        if isinstance(self.clients_per_round, float):
            return max(1, round(self.clients_per_round * self.clients))
        return self.clients if self.clients_per_round == "all" else self.clients_per_round

    def problems(self) -> Iterator[Problem]:
        part = self.clients_per_round
        if isinstance(part, float) and not 0 < part <= 1:
            yield "clients_per_round", f"as a fraction it is above 0 and at most 1, got {part}"
        elif isinstance(part, int) and not 1 <= part <= self.clients:
            yield "clients_per_round", f"expected 1 to {self.clients} (the clients), got {part}"
        elif self.min_clients > self.sampled:
            few = f"{self.min_clients} are more than the {self.sampled} clients of a round"
            yield "min_clients", few
        if self.names is not None and len(set(self.names)) != self.clients:
            yield "names", f"expected {self.clients} different names (the clients)"
        for name in self.names or []:
            if not CLIENT_NAME.fullmatch(name):
                yield "names", f"{name!r}: {CLIENT_NAME_RULE}"


GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
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
    "glue": (["name"], []),
    "text-classification": ([], ["labels", "text_column", "text_pair_column", "label_column"]),
    "causal-lm": ([], ["text_column"]),
    "instruction": (["prompt", "response"], ["max_new_tokens", "generate"]),
    "e2e": ([], ["max_new_tokens", "generate", "num_beams"]),
    "math": ([], ["name", "max_new_tokens", "generate", "compare"]),
    "commonsense": ([], ["name", "max_new_tokens", "generate", "score"]),
    "image-classification": ([], ["labels", "image_column", "label_column"]),
}
TASK_NAMES: dict[str, Sequence[str]] = {  # kind: the values of `name`
    "glue": GLUE,
    "math": ("metamath", "gsm8k", "math"),
    "commonsense": COMMONSENSE,
}


_LABELLED = ("text-classification", "image-classification")  # by classes of the user's own


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

    def problems(self) -> Iterator[Problem]:
        needed, optional = _TASK_FIELDS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                yield name, f"missing; a task of kind {self.kind} needs it"
        for name, field in type(self).model_fields.items():
            fits = name in ("kind", *needed, *optional)
            fits |= name == "max_length" and self.kind != "image-classification"
            if not fits and getattr(self, name) != field.default:
                yield name, f"a task of kind {self.kind} does not use it"
        names = TASK_NAMES.get(self.kind)
        if names and self.name is not None and self.name not in names:
            yield "name", f"expected one of {_names(names)}" + did_you_mean(self.name, names)
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
    evaluation: dict[str, str] = {}  # further evaluation splits: a file, or NAME[:CONFIG][@SPLIT]
    train_examples: int | None = Field(default=None, ge=1)  # a seeded sample of the training rows
    evaluation_examples: int | None = Field(default=None, ge=1)  # of each evaluation split

    def problems(self) -> Iterator[Problem]:
        given = {k for k in ("name", "path", "clients", "source") if getattr(self, k) is not None}
        if len(given) != 1 and given != {"clients", "path"}:
            got = _names(sorted(given)) or "none"
            sources = "name, path, clients, source (or clients with path)"
            yield "", f"expected exactly one of {sources}, got {got}"
        if self.clients is not None and len(set(self.clients)) < max(1, len(self.clients)):
            yield "clients", "expected one or more files, all different"
        for option in ("config", "revision"):
            if getattr(self, option) is not None and self.name is None:
                yield option, "only a data set of the hub (`name`) has one"


class EvaluationSpec(Part):
    where: Literal["server", "clients", "both"] = "server"
    every: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)
    client_fraction: float = Field(
        default=0.1, gt=0, lt=1
    )  # of each client's rows, when clients evaluate
    patience: int | None = Field(
        default=None, ge=1
    )  # early stopping: rounds without a better score


class RecordsSpec(Part):
    save_updates: bool = False


class EngineSpec(Part):
    """How messages are carried: in this process, or by Flower, across machines or simulated."""

    kind: Literal["local", "flower", "flower-simulation"] = "local"
    threads: int = Field(default=1, ge=1, le=1024)
    client_cpus: int = Field(default=1, ge=1)  # flower-simulation: of each client that trains
    client_gpus: float = Field(default=0.0, ge=0)


class Recipe(Part):
    """Everything that determines a run."""

    name: str
    seed: int = Field(default=0, ge=0)
    model: ModelSpec
    lora: LoraSpec = LoraSpec()
    method: MethodSpec = MethodSpec()
    federation: FederationSpec = FederationSpec()
    task: TaskSpec
    data: DataSpec
    training: dict[str, Any] = {}
    evaluation: EvaluationSpec = EvaluationSpec()
    records: RecordsSpec = RecordsSpec()
    engine: EngineSpec = EngineSpec()

    @field_validator("training")
    @classmethod
    def _training(cls, training: dict[str, Any]) -> dict[str, Any]:
        _raise((key, why) for key, why in REFUSED_TRAINING.items() if key in training)
        return training

    def problems(self) -> Iterator[Problem]:
        yield from self._clients()
        yield from self._ranks()
        yield from self._engine()
        labels_known = self.task.labels is not None or self.data.source is not None
        if self.task.kind in _LABELLED and not labels_known:
            yield "task.labels", "missing; list all labels, in the order all clients agree on"
        if self.model.quantisation and METHODS[self.method.name].trains == "all":
            yield (
                "model.quantisation",
                f"{self.method.name} trains the base, so it stays unquantised",
            )

    def _clients(self) -> Iterator[Problem]:
        if self.data.clients is None:
            return
        if len(self.data.clients) != self.federation.clients:
            files = f"data.clients lists {len(self.data.clients)} files"
            yield "federation.clients", f"{self.federation.clients}, but {files}; leave it out"
        if "partition" in self.federation.model_fields_set:
            yield "federation.partition", "data.clients already says whose rows are whose"

    def _engine(self) -> Iterator[Problem]:
        method, fed = METHODS[self.method.name], self.federation
        if self.engine.kind == "local":
            if fed.oversample > 1:
                yield "federation.oversample", "in one process nobody is late; use engine: flower"
            return
        if method.pooled or not method.exchanges:
            yield "engine.kind", f"{self.method.name} exchanges nothing; run it with engine: local"
        if fed.failure_rate:
            yield "federation.failure_rate", "a rehearsal of failures is for engine: local"
        if fed.names is not None and self.data.clients is not None:
            yield "federation.names", "the files of data.clients give the names already"
        known = fed.names is not None or self.data.clients is not None
        if self.lora.ranks is not None and not known and self.engine.kind == "flower":
            yield "federation.names", "missing; lora.ranks belong to clients in the order of names"

    def _ranks(self) -> Iterator[Problem]:
        if self.lora.ranks is None:
            return
        if not METHODS[self.method.name].ranks_may_differ:
            able = _names(name for name, method in METHODS.items() if method.ranks_may_differ)
            yield "lora.ranks", f"{self.method.name} needs equal ranks; these do not: {able}"
        if self.lora.init is not None:
            yield "lora.ranks", "an adapter to start from (lora.init) has one rank for all clients"
        if len(self.lora.ranks) != self.federation.clients:
            count = f"{len(self.lora.ranks)} for {self.federation.clients} clients"
            yield "lora.ranks", f"expected one rank for each client, got {count}"
