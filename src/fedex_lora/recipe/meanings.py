"""What every key of a recipe means, with an example of each.

A field's own `description` and `examples` come first, so that tasks of other packages explain
themselves; the rest stands here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedex_lora.recipe.task import TaskSpec, built_in_kinds, spec_of
from fedex_lora.recipe.whole import Recipe


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: Dotted, e.g. `lora.r`.
        kind: The task that it belongs to, or "".
        type: For people: "whole number of at least 1".
        default: As in YAML; "" where it has to be given.
        meaning: What it says; "" where nobody has said it.
        example: A value, as in YAML.
    """

    name: str
    kind: str
    type: str
    default: str
    meaning: str
    example: str


def keys() -> Iterator[Key]:
    """All keys of a recipe, in the order of its blocks; a task's own after those of all tasks."""
    for name, field in _fields(Recipe):
        if name != "task":
            yield _key(name, "", field)
            continue
        common = TaskSpec.model_fields
        yield from (_key(f"task.{key}", "", field) for key, field in common.items())
        for kind in built_in_kinds():
            spec = spec_of(kind)
            assert spec is not None
            own = (item for item in spec.model_fields.items() if item[0] not in common)
            yield from (_key(f"task.{key}", kind, field) for key, field in own)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        part = _part(field.annotation)
        if part is None or part is TaskSpec:
            yield prefix + name, field
        else:
            yield from _fields(part, f"{prefix}{name}.")


def _part(annotation: Any) -> type[BaseModel] | None:
    """The block that a field holds, if it holds one."""
    inner = [one for one in get_args(annotation) or [annotation] if one is not type(None)]
    if len(inner) == 1 and isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
        return inner[0]
    return None


def _key(name: str, kind: str, field: FieldInfo) -> Key:
    example, meaning = MEANINGS.get(f"{name} ({kind})", MEANINGS.get(name, ("", "")))
    if field.examples:
        example = _yaml(field.examples[0])
    default = "" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
    type = _type(field.annotation) + _bounds(field.metadata)
    return Key(name, kind, type, default, field.description or meaning, example)


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, BaseModel):
        return "{}"
    return str(value)


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}


def _type(annotation: Any) -> str:
    """A type in words.

    Example:
        >>> _type(list[str] | None), _type(Literal["a", "b"])
        ('list of text', 'a, b')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0]) + _bounds(inner[1:])
    if origin is Literal:
        return ", ".join(_yaml(one) for one in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"block of {_type(inner[1])}"
    return _NAMES.get(annotation, "any" if annotation is Any else str(annotation))


_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _bounds(metadata: Any) -> str:
    """
    Example:
        >>> from pydantic import Field
        >>> _bounds([Field(gt=0, le=1)])
        ' (above 0, at most 1)'
    """
    single = [one for m in metadata for one in (m.metadata if isinstance(m, FieldInfo) else [m])]
    parts = [
        f"{word} {getattr(one, bound)}"
        for one in single
        for bound, word in _WORDS.items()
        if hasattr(one, bound)
    ]
    return f" ({', '.join(parts)})" if parts else ""


MEANINGS: Mapping[str, tuple[str, str]] = {  # by key, or `key (task's kind)`: example, meaning
    "name": ("sentiment", "What the run is called, in its folder's name and its records."),
    "seed": ("0", "All that is random follows from it: adapters, samples, order of rows."),
    "model.name": ("FacebookAI/roberta-base", "Hub id, local path, or `package:NAME/FOLDER` of an "
        "installed Python package."),
    "model.revision": ("main", "Branch, tag or commit of a model of the hub."),
    "model.dtype": ("bfloat16", "What the frozen weights are held in."),
    "model.placement": ("side", "Where the residual goes: into the frozen weights (`fold`) or "
        "beside the layer (`side`)."),
    "model.quantisation": ("nf4", "Frozen weights in 4 or 8 bits, by bitsandbytes; needs "
        "`placement: side`."),
    "model.device": ("cuda:0", "`auto` takes a GPU where there is one."),
    "lora.r": ("8", "Rank of the adapters."),
    "lora.lora_alpha": ("16", "The product B·A is scaled by lora_alpha / r."),
    "lora.lora_dropout": ("0.1", "Share of a layer's inputs that the adapter does not see in "
        "training."),
    "lora.target_modules": ("[query, value]", "Layers to adapt: ends of their names, a pattern, or "
        "`all-linear`; without it PEFT's choice for the architecture."),
    "lora.exclude_modules": ("[lm_head]", "Layers that are not adapted although named."),
    "lora.modules_to_save": ("[classifier]", "Modules trained and averaged in full; of a "
        "classifier, without it, the head."),
    "lora.use_rslora": ("true", "Scale by lora_alpha / √r."),
    "lora.rank_pattern": ("{attention.output: 4}", "Ranks of single layers, by pattern of name."),
    "lora.alpha_pattern": ("{attention.output: 8}", "lora_alpha of single layers."),
    "lora.layers_to_transform": ("[0, 1]", "Numbers of the blocks that are adapted."),
    "lora.layers_pattern": ("layer", "What the list of blocks is called in the model."),
    "lora.fan_in_fan_out": ("true", "Weights are stored as in × out. Found out by itself."),
    "lora.init_lora_weights": ("gaussian", "How A starts; B starts at zero."),
    "lora.bias": ("none", "Biases stay frozen: others would not be averaged exactly."),
    "lora.init": ("adapters/start", "A PEFT adapter to start from, in place of a new one."),
    "lora.ranks": ("[4, 8, 16]", "One rank for each client, for methods that allow it."),
    "method.name": ("fedex", "How updates are aggregated; `fedex-lora methods` lists them."),
    "method.rank": ("8", "Rank that the residual is cut to (fedex-svd)."),
    "method.carry": ("false", "What was cut off is kept and added to the next residual."),
    "method.flush": ("false", "What is still kept back is sent whole in the last round."),
    "method.options": ("{energy: 0.9}", "Options of the method's assignment, for methods that have "
        "some (here florist's)."),
    "federation.clients": ("5", "How many clients; with `data.clients` as many as files."),
    "federation.rounds": ("10", "How often updates are aggregated."),
    "federation.clients_per_round": ("0.5", "How many take part in a round: all, a number, or a "
        "share."),
    "federation.weights": ("uniform", "Clients count by their rows, or equally."),
    "federation.mean": ("median", "How updates are averaged; a few liars do not decide others than "
        "`weighted`."),
    "federation.liars": ("1", "How many clients of a round the mean is to withstand."),
    "federation.align": ("true", "Each client's pair is rotated towards the A it began with before "
        "it is averaged."),
    "federation.proximal": ("0.01", "FedProx: how strongly a client is held to where it began."),
    "federation.asynchronous.staleness": ("3", "An update that comes so many rounds late, at most, "
        "is still taken, from where it started."),
    "federation.asynchronous.exponent": ("1", "How fast late updates lose weight: n·(1 + τ)^−a."),
    "federation.asynchronous.delay": ("0.3", "Rehearsal: how probably an update comes late. "
        "Engine local."),
    "federation.scaffold": ("true", "SCAFFOLD: every client's steps are corrected for what is its "
        "own, by control variates."),
    "federation.server_optimizer.name": ("fedavgm", "What the server makes of the mean change: "
        "fedavgm, fedadam or fedyogi."),
    "federation.server_optimizer.learning_rate": ("0.5", "By which it multiplies its step."),
    "federation.server_optimizer.momentum": ("0.5", "How much of the last step it keeps."),
    "federation.server_optimizer.beta2": ("0.95", "fedadam, fedyogi: the same of the squares."),
    "federation.server_optimizer.tau": ("0.01", "fedadam, fedyogi: added to their root."),
    "federation.server_learning_rate": ("0.5", "The mean change is multiplied by it."),
    "federation.min_clients": ("2", "Fewer valid updates stop the run; its checkpoints stand."),
    "federation.failure_rate": ("0.2", "Rehearsal: the probability that a client fails in a round. "
        "Engine local."),
    "federation.wire_dtype": ("bfloat16", "What numbers are sent in."),
    "federation.partition.kind": ("dirichlet", "How one data set is dealt out to clients."),
    "federation.partition.alpha": ("0.3", "dirichlet: smaller: fewer classes a client has."),
    "federation.partition.shards_per_client": ("2", "shards: sorted pieces of each client."),
    "federation.partition.column": ("hospital", "by: a client for each value. dirichlet, shards: "
        "dealt out by this column in place of the labels."),
    "federation.max_norm": ("50", "An update of a larger norm is refused."),
    "federation.max_norm_ratio": ("5", "The same in medians of the round's other updates, from "
        "three clients on."),
    "federation.max_share": ("0.5", "No client counts for more than this share, from three on."),
    "federation.names": ("[berlin, lagos, lima]", "Who may take part, across machines."),
    "federation.round_timeout": ("600", "Seconds until a round goes on without the late."),
    "federation.wait_for_clients": ("60", "Seconds to wait while there are too few clients."),
    "federation.oversample": ("1.5", "Ask so many times as many clients; the first count."),
    "task.kind": ("text-classification", "What is learned. The keys below depend on it."),
    "task.max_length": ("256", "Tokens of a row; what is longer is cut or left out."),
    "task.evaluation_max_length": ("512", "The same for rows that are scored; without it "
        "max_length."),
    "task.columns": ("{question: prompt}", "The task's name of a column, and your rows' name of "
        "it."),
    "task.name": ("sst2", "Which data set of this family."),
    "task.template": ("chatml", "How a conversation becomes text: the tokenizer's own template, a "
        "name, or a file of Jinja."),
    "task.packing": ("true", "Several rows in one sequence, as many as fit; none sees another."),
    "task.mask_probability": ("0.15", "Share of the tokens that are hidden and have to be found."),
    "task.separator": ('";"', "Between the classes of a row, where they stand in one text."),
    "task.question_column": ("question", "The column with the question."),
    "task.choices_column": ("choices", "The column with the list of answers."),
    "task.choice_columns": ("[a, b, c]", "Columns with an answer each, in place of a list."),
    "task.max_target_length": ("64", "Tokens of what is to be written."),
    "task.minimum": ("0", "The least value that a row may have."),
    "task.maximum": ("5", "The largest."),
    "task.tokens_column": ("tokens", "The column with the list of words."),
    "task.tags_column": ("tags", "The column with each word's tag."),
    "task.entities_column": ("entities", "The column with spans of the text, where no words are "
        "given."),
    "task.labels": ("[complaint, praise]", "All classes, in the order that all clients agree on."),
    "task.text_column": ("text", "The column with the text."),
    "task.text_pair_column": ("hypothesis", "A second text, for tasks on pairs."),
    "task.label_column": ("label", "The column with the class."),
    "task.answer_column": ("answer", "The column with the answer."),
    "task.image_column": ("image", "The column with the image, or its file's path."),
    "task.prompt": ('"Question: {question}\\nAnswer:"', "What the model is given; your columns in "
        "braces."),
    "task.response": ('" {answer}"', "What it learns to answer; the loss counts this alone."),
    "task.max_new_tokens": ("64", "Length of a generated answer."),
    "task.generate": ("true", "Answers are generated and scored in evaluation."),
    "task.rouge": ("false", "Generated texts are scored by ROUGE, too, and rougeL selects."),
    "task.num_beams": ("10", "Width of the beam search."),
    "task.compare": ("string", "How answers are compared: as mathematics or as text."),
    "task.score": ("likelihood", "Whether an answer is generated, or the likeliest is taken."),
    "data.name": ("nyu-mll/glue", "A data set of the hub."),
    "data.config": ("sst2", "Its configuration."),
    "data.revision": ("main", "Its branch, tag or commit."),
    "data.path": ("data/reviews", "A directory with train, validation and test as JSON Lines, CSV "
        "or Parquet. With `clients`, only what is scored comes from there."),
    "data.clients": ("[berlin.csv, lagos.csv]", "One file for each client, which gives its name."),
    "data.source": ("stdlib-docs", "Rows that come with this program."),
    "data.validation": ("{berlin: berlin-dev.csv}", "Files of validation rows of clients, by "
        "name, in place of a share of their rows."),
    "data.evaluation": ("{other: other.csv}", "Further rows to score on: a file, or "
        "NAME[:CONFIG][@SPLIT] of the hub."),
    "data.keep_in_memory": ("false", "Whether files' rows are in memory, or mapped from disk."),
    "data.train_examples": ("1000", "Only so many training rows, chosen by the seed."),
    "data.evaluation_examples": ("500", "Only so many rows of each evaluation split."),
    "training": ("{learning_rate: 1.0e-3, num_train_epochs: 1}", "Any of transformers' "
        "TrainingArguments, for each client in each round."),
    "evaluation.where": ("both", "Scored at the server, on clients' own rows, or both."),
    "evaluation.every": ("5", "Every how many rounds; the last one always."),
    "evaluation.batch_size": ("32", "Rows at once."),
    "evaluation.client_fraction": ("0.2", "Share of a client's rows that is kept from training, "
        "where clients score."),
    "evaluation.patience": ("3", "Stop after so many rounds without a better score."),
    "privacy.secure_aggregation.threshold": ("3", "How many clients must stay to the end of a "
        "round; without it, more than half."),
    "privacy.secure_aggregation.bits": ("32", "Of fixed point, below a tensor's largest entry."),
    "privacy.secure_aggregation.rank": ("16", "Of the sketch of the products; `exact` for no "
        "approximation."),
    "privacy.secure_aggregation.repeat": ("2", "How often a round that loses too many clients is "
        "begun anew; after that the run stops, to be resumed."),
    "privacy.example_level.epsilon": ("8", "Differential privacy of single rows (DP-SGD): what a "
        "run may spend of a client's rows."),
    "privacy.example_level.delta": ("1.0e-5", "The probability with which epsilon may not hold."),
    "privacy.example_level.max_grad_norm": ("1.0", "Every row's gradient is clipped to this norm."),
    "privacy.example_level.noise_multiplier": ("0.8", "Noise in units of max_grad_norm; found "
        "from epsilon if left out."),
    "privacy.client_level.noise_multiplier": ("1.1", "Differential privacy of whole clients: noise "
        "on the mean of clipped updates, in units of the bound."),
    "privacy.client_level.clip": ("1.0", "Bound of an update's norm; with `adaptive` the first."),
    "privacy.client_level.delta": ("1.0e-5", "The probability with which epsilon may not hold."),
    "privacy.client_level.epsilon": ("8", "The run stops at the last round within it."),
    "privacy.client_level.adaptive": ("true", "The bound follows a quantile of the norms."),
    "privacy.client_level.quantile": ("0.5", "Which quantile."),
    "privacy.client_level.clip_learning_rate": ("0.2", "How fast the bound's logarithm follows."),
    "privacy.rehearsal": ("true", "Noise follows from the seed: for tests, and not private."),
    "records.save_updates": ("true", "Keep every update, so that anybody can recompute the mean."),
    "records.spectrum": ("16", "How many singular values of each layer's global change to record, "
        "every round."),
    "engine.kind": ("flower", "Clients in this process, on machines of their own, or simulated "
                    "(local, flower, flower-simulation); or a registered transport."),
    "engine.train": ("null", "A training loop that a package or script registers, in the place "
                     "of the Trainer (CONTRIBUTING.md)."),
    "engine.threads": ("4", "Of the CPU. Runs with equal numbers repeat bit for bit."),
    "engine.precision": ("auto", "What training computes in; auto measures what is faster, once."),
    "engine.fuse": ("auto", "How many clients train in one pass; auto measures, once."),
    "engine.client_cpus": ("2", "flower-simulation: of each client that trains."),
    "engine.client_gpus": ("0.5", "flower-simulation: the same of GPUs."),
}  # fmt: skip
