"""Training by transformers.Trainer: its arguments, checked, and a client's turn."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from statistics import fmean
from time import perf_counter
from typing import Any, Protocol, cast, get_type_hints

import torch
from datasets import Dataset
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PrinterCallback, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from fedex_lora.aggregation.adapter import AdapterState, weight_name
from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.pulls import pulled
from fedex_lora.engines.trainer import LabelledTrainer, OnStep, walked_once
from fedex_lora.engines.training_log import TrainingLog, named, reported
from fedex_lora.engines.turn import OnTurn, Trained, Turn
from fedex_lora.errors import UserError, shown
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Problem, did_you_mean
from fedex_lora.recipe.refused import GONE_TRAINING
from fedex_lora.recipe.wording import in_words
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Collate

# what transformers and torch raise for settings they cannot use
_REFUSED = (
    TypeError,
    ValueError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
)


GRADIENT_BATCHES = 8  # of a client, over which a gradient is taken that factors are made from


_BY_SCORES = ("reduce_lr_on_plateau", "greedy")  # schedules


def training_problems(training: Mapping[str, Any]) -> Iterator[Problem]:
    """The key of every name that TrainingArguments does not know and every value that is none."""
    kinds = _kinds()
    names = list(kinds)
    for name, value in training.items():
        key = f"training.{name}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in names:
            now = GONE_TRAINING.get(name)
            yield key, f"unknown key{f'; set {now}' if now else did_you_mean(name, names)}"
        elif kinds[name] in (int, float) and not is_number:
            yield key, f"expected a number, got {shown(value)}"
        elif is_number and not _of_64_bits(value):
            yield key, f"expected a number that is finite, got {value}"
        elif value is None and name in _defaults_to_none():
            continue
        elif kinds[name] not in (int, float) and not _is(kinds[name], value):
            yield key, f"expected {in_words(kinds[name])}, got {shown(value)}"
        elif name == "lr_scheduler_type" and value in _BY_SCORES:
            yield (
                key,
                f"{value} goes by scores that clients do not take; expected another, as cosine",
            )


@cache
def _kinds() -> dict[str, Any]:
    """The types of what TrainingArguments takes, by name."""
    hints = get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


@cache
def _defaults_to_none() -> frozenset[str]:
    """What may be null, whatever its type says."""
    return frozenset(f.name for f in dataclasses.fields(TrainingArguments) if f.default is None)


def _of_64_bits(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63


def _is(kind: Any, value: Any) -> bool:
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def training_arguments(
    training: Mapping[str, Any], seed: int, device: torch.device, directory: str
) -> TrainingArguments:
    """TrainingArguments from the recipe's `training` block and what the program settles itself.

    A loss that is NaN stays NaN (the Trainer would filter it), nothing is saved, and the seed
    decides dropout and the order of the rows.

    Raises:
        UserError: Unknown names (with the nearest valid one) or values the Trainer refuses.
    """
    if problems := [f"{key}: {text}" for key, text in training_problems(training)]:
        raise UserError("\n".join(problems))
    ours: dict[str, Any] = {
        "output_dir": directory,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
    }
    theirs = {"report_to": "none", "train_sampling_strategy": "group_by_length", **training}
    try:
        return TrainingArguments(**theirs, **ours)
    except _REFUSED as error:
        raise UserError(f"training: transformers.TrainingArguments says: {error}") from None


def _compiles(training: Mapping[str, Any]) -> bool:
    """Whether torch.compile looks into the module, which takes no methods but a class's own."""
    keys = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
    return any(training.get(key) for key in keys)


@contextmanager
def quick_collections() -> Iterator[None]:
    """accelerate collects garbage after every turn. What is there already (libraries, the model,
    the rows) stays, and takes long to look through."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Batches(Protocol):
    """How rows become batches; a `Task` says so, among other things.

    Attributes:
        image: Whether rows are images, which have no lengths.
    """

    @property
    def image(self) -> Any: ...

    def collator(self, tokenizer: Any, /) -> Collate: ...


@dataclass(frozen=True)
class HFTrainer:
    """Training by transformers.Trainer, one client after the other.

    Attributes:
        task: How rows become batches.
        training: Arguments of TrainingArguments, as in a recipe's block of that name.
        on_step: Is told (turn, steps done, steps in all, loss).
        log: Where the Trainer's own reports go, if the arguments ask for any.
        proximal: μ of FedProx (Li et al., arXiv 1812.06127): the loss is that of the rows and
            μ/2·‖x − x⁰‖², where x is all that is trained, factors by themselves and head, and x⁰
            where the turn began. The `loss` that is told is of the rows alone.
    """

    task: Batches
    training: Mapping[str, Any]
    on_step: OnTurn | None = None
    log: TrainingLog | None = None
    proximal: float = 0.0
    together: int = 1
    _last: list[LabelledTrainer] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        return [self._train(model, turn) for turn in turns]

    def _train(self, model: AdaptedModel, turn: Turn) -> Trained:
        began = perf_counter()
        if turn.gradients:
            return self._first_gradients(model, turn)
        model.write(turn.start)
        # not before: what is written may replace parameters
        with nullcontext() if _compiles(self.training) else walked_once(model.module):
            model.freeze(turn.trained, turn.head)
            log = self.log.turn(turn.client, turn.round) if self.log else None
            on_step = partial(self.on_step, turn) if self.on_step else None
            trainer = self._trainer(model, turn, on_step, log)
            accelerator = trainer.accelerator
            pulls = pulled(
                model.parameters(), turn, self.proximal, lambda: accelerator.sync_gradients
            )
            with reported(trainer, log), attention(trainer.args), pulls as sums:
                try:
                    output = trainer.train()
                except ImportError as error:  # of what it looks for only here
                    raise UserError(f"training: {error}") from None
            _release(trainer, model)
            metrics = {
                "loss": output.training_loss,
                "steps": float(output.global_step),
                "seconds": perf_counter() - began,
            }
            variates = {n: g.cpu() / output.global_step for n, g in sums.items()}
            return Trained(metrics, replace(model.read(), variates=variates))

    def _first_gradients(self, model: AdaptedModel, turn: Turn) -> Trained:
        """The mean gradient of every adapted layer's whole weight over the first batches, in the
        place of a training; all else ends where it began."""
        began, losses, trainer = perf_counter(), [], None
        model.write(turn.plain_start)
        with model.gradients() as found:
            trainer = self._trainer(model, turn, None, None)
            module = model.module.train()
            batches = islice(trainer.get_train_dataloader(), GRADIENT_BATCHES)
            for batch in batches:
                loss = trainer.compute_loss(module, trainer._prepare_inputs(batch))
                loss.backward()
                losses.append(loss.item())
        _release(trainer, model)
        head = {weight_name(name): g / len(losses) for name, g in found.items()}
        end = AdapterState(turn.start.layers, {**turn.start.head, **head})
        seconds = perf_counter() - began
        return Trained({"loss": fmean(losses), "steps": 0.0, "seconds": seconds}, end)

    def _trainer(
        self, model: AdaptedModel, turn: Turn, on_step: OnStep | None, log: TrainingLog | None
    ) -> LabelledTrainer:
        """A Trainer for this turn: the last turn's, begun anew, where that comes to the same."""
        seed = derive(turn.seed, "train", turn.round, turn.client)
        if self._last and self._last[0].renewable(model.module):
            self._last[0].renew(turn.rows, seed, on_step)
            return self._last[0]
        directory = tempfile.mkdtemp()
        try:
            trainer = make_trainer(
                model, self.task, turn.rows, named(self.training, log), seed, directory, on_step
            )
        except BaseException:
            shutil.rmtree(directory)
            raise
        weakref.finalize(trainer, shutil.rmtree, directory, ignore_errors=True)
        self._last[:] = [trainer]
        return trainer


def _release(trainer: LabelledTrainer, model: AdaptedModel) -> None:
    """Takes off the model, which clients and evaluation share, what accelerate leaves there: the
    wrapper of mixed precision, and the mark that would keep the next turn from getting one."""
    if not trainer.plain:
        trainer.accelerator.unwrap_model(model.module, keep_fp32_wrapper=False)
    vars(model.module).pop("_is_accelerate_prepared", None)
    model.release()


def try_settings(
    training: Mapping[str, Any], task: Task, model: AdaptedModel, rows: Sequence[Any] | Dataset
) -> None:
    """Makes the optimizer and the schedule that training will make, for one number: bad settings
    show before round 1.

    Args:
        rows: Of the client that has the fewest.

    Raises:
        UserError: What transformers, the optimizer or the schedule say of the recipe's `training`
            block; or no batch is left of the rows.
    """
    with tempfile.TemporaryDirectory() as directory:
        args = training_arguments(_ordered(training, task), 0, model.device, directory)
    try:
        for reports in get_reporting_integration_callbacks(args.report_to):
            reports()  # says whether its library is there
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model.module)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            given = [options.pop(n) for n in ("params", "model", "optimizer_dict") if n in options]
            number = nn.Parameter(torch.zeros(1, device=model.device))
            optimizer = kind(given[0] if given else [number], **options)
            warmup, more = args.get_warmup_steps(1), cast(Any, args.lr_scheduler_kwargs)
            get_scheduler(args.lr_scheduler_type, optimizer, warmup, 1, more)
        if task.image and args.train_sampling_strategy == "group_by_length":
            raise ValueError("train_sampling_strategy: group_by_length, and images have no lengths")
        if args.torch_compile:  # compiles nothing yet, but knows its modes
            backend = args.torch_compile_backend or "inductor"
            torch.compile(nn.Identity(), backend=backend, mode=args.torch_compile_mode)
    except Exception as error:  # every library that takes part has kinds of its own
        raise UserError(f"training: {type(error).__name__}: {error}") from None
    if args.dataloader_drop_last and len(rows) < args.train_batch_size:
        raise UserError(
            "training: no batch is left of a client's rows; set dataloader_drop_last: false"
        )
    unsmoothed = {
        "a regression": task.regression,
        "any number of classes": task.multi_label,
        "a decoder": task.peft_task_type == "SEQ_2_SEQ_LM",
    }
    odd = next((what for what, found in unsmoothed.items() if found), None)
    if odd and training.get("label_smoothing_factor"):
        raise UserError(f"training.label_smoothing_factor: labels of {odd} cannot be smoothed")


def make_trainer(
    model: AdaptedModel,
    task: Batches,
    rows: Dataset,
    training: Mapping[str, Any],
    seed: int,
    directory: str,
    on_step: OnStep | None = None,
    collate: Callable[[list[dict[str, Any]]], Any] | None = None,
) -> LabelledTrainer:
    """The Trainer of one turn.

    Raises:
        UserError: What the Trainer says of the recipe's `training` block.
    """
    args = training_arguments(_ordered(training, task), seed, model.device, directory)
    collator = collate or task.collator(model.tokenizer)
    try:
        trainer = LabelledTrainer(
            model=model.module, args=args, train_dataset=rows, data_collator=collator
        )
    except Exception as error:  # every library that takes part has kinds of its own
        raise UserError(f"training: {type(error).__name__}: {error}") from None
    trainer.remove_callback(PrinterCallback)
    trainer.tell(on_step)
    return trainer


def score(
    model: AdaptedModel,
    task: Batches,
    rows: Dataset,
    batch_size: int,
    metric: Callable[[Any], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """The loss of the model as it is, and what `metric`, a `compute_metrics` of transformers, tells
    of its predictions and the labels."""
    given = {"per_device_eval_batch_size": batch_size}
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(model, task, rows, given, 0, directory)
        trainer.compute_metrics = cast(Any, metric)
        found = trainer.evaluate(cast(Any, rows))
        _release(trainer, model)
    told = {key.removeprefix("eval_"): value for key, value in found.items()}
    spent = ("runtime", "_per_second", "preparation_time", "epoch")
    return {key: value for key, value in told.items() if not key.endswith(spent)}


def _ordered(training: Mapping[str, Any], task: Batches) -> Mapping[str, Any]:
    """Images have no lengths by which to group them."""
    return {"train_sampling_strategy": "random", **training} if task.image else training


def attention(args: TrainingArguments) -> AbstractContextManager[object]:
    """On a CPU, plain products in place of torch's fused attention, which on some is slow in
    bfloat16 (`python -m benchmarks precision`); with dropout torch takes them by itself."""
    return sdpa_kernel(SDPBackend.MATH) if args.use_cpu and args.bf16 else nullcontext()


def steps_of(rows: int, args: TrainingArguments) -> int:
    """Optimizer steps of a client's turn, as transformers.Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    count = math.floor if args.dataloader_drop_last else math.ceil
    batches = count(rows / args.train_batch_size)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)
