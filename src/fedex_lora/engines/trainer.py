"""transformers.Trainer for a client's turn: many short trainings on one model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from fedex_lora.tasks.labelled import head_of, is_causal, token_losses

OnStep = Callable[[int, int, float | None], None]
"""(steps done, steps in all, the last step's loss; None where it was not read)"""
_OFTEN = 0.5  # seconds between two looks at a loss on a device, which wait for it


class Looks:
    """Reads losses for people: on a device that has to be waited for, seldom."""

    def __init__(self) -> None:
        self._last = 0.0

    def read(self, loss: Tensor) -> float | None:
        """The value, or None where it was read just before."""
        now = time.monotonic()
        if loss.device.type != "cpu" and now - self._last < _OFTEN:
            return None
        self._last = now
        return float(loss)


class LabelledTrainer(Trainer):
    """transformers.Trainer, whose loss of causal language models is computed at labelled positions
    alone (`tasks.labelled`); it has the gradients that the Trainer's has, up to rounding.

    Of several batches a step (`gradient_accumulation_steps`) the loss is the mean over the labels
    of all of them, as if they were one. The Trainer leaves that to every model that takes further
    arguments, and many of these (BERT, T5, transformers' general classifiers) return the mean of
    the batch all the same: the sum of such means is larger by the number of batches.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.get("labels")
        wrapped = model is not self.model  # compiled, or spread over devices
        if return_outputs or labels is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        head = None if wrapped or not is_causal(model) else head_of(model, inputs["input_ids"])
        if head is None:
            share = self._share(inputs, num_items_in_batch)
            if share is None:
                return super().compute_loss(model, inputs, False, num_items_in_batch)
            return super().compute_loss(model, inputs) * share
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        smoothing = self.args.label_smoothing_factor
        with self.accelerator.autocast():
            losses = token_losses(head, rest, labels, smoothing)
        return losses.total / (
            len(losses.each) if num_items_in_batch is None else num_items_in_batch
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Of numbers to be predicted all count: −100 is one of them, and no mark of a gap."""
        counted = [
            {**batch, "labels": torch.zeros_like(labels)}
            if isinstance(labels := batch.get("labels"), Tensor) and labels.is_floating_point()
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def _share(self, inputs: dict[str, Any], items: Any) -> Any:
        """What part of a step's labels this batch has, where there are more batches to the step."""
        if items is None or self.args.gradient_accumulation_steps == 1:
            return None
        own: Any = self._get_num_items_in_batch([inputs], self.args.device)
        return own / items if own.any() else None  # of no labels there is no mean

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Where the loss alone is asked for, it is that of labelled positions, as in training."""
        if not prediction_loss_only or inputs.get("labels") is None or not is_causal(model):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, prepared)
        return loss.mean().detach(), None, None

    @property
    def plain(self) -> bool:
        """Whether accelerate puts nothing on the model: one device, one precision."""
        accelerator = self.accelerator
        alone = accelerator.distributed_type == DistributedType.NO
        return alone and not accelerator.native_amp and not self.args.torch_compile

    def renewable(self, module: nn.Module) -> bool:
        """Whether `renew` makes it what a new Trainer for this model would be: it is for the same
        one, and nothing that lasts beyond a training (a gradient scaler, a report) is in it."""
        return (
            self.model is module
            and self.accelerator.distributed_type == DistributedType.NO
            and self.accelerator.scaler is None
            and not self.args.report_to
            and not self.args.torch_compile
            and not self.args.auto_find_batch_size
        )

    def renew(self, rows: Any, seed: int, on_step: OnStep | None) -> None:
        """Begins a training anew, with other rows and another seed, as a new Trainer would."""
        self.args.seed = self.args.data_seed = seed
        self.accelerator.dataloader_config.data_seed = seed
        (seed_cpu if self.args.use_cpu else set_seed)(seed)
        self.train_dataset = rows
        self.optimizer = self.lr_scheduler = None
        self.tell(on_step)
        if self.plain:  # there would be nothing to do but two walks over its modules
            vars(self.model)["_is_accelerate_prepared"] = True
            vars(self.accelerator)["verify_device_map"] = lambda _: False  # as it is: one device

    def tell(self, on_step: OnStep | None) -> None:
        """Who is told of steps from now on."""
        self.remove_callback(_Steps)
        self._losses = None
        if on_step is not None:
            self._losses = []
            self.add_callback(_Steps(on_step, self._losses))

    def training_step(self, *args: Any, **given: Any) -> Any:
        loss = super().training_step(*args, **given)
        if self._losses is not None:
            self._losses.append(loss)
        return loss

    _losses: list[Tensor] | None = None  # of the step's batches

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return model if self.plain else super()._wrap_model(model, training, dataloader)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Those whose weights decay; a model's are looked for once."""
        if self._decaying is None:
            self._decaying = super().get_decay_parameter_names(model)
        return self._decaying

    _decaying: list[str] | None = None

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        """As the Trainer has it; a model's weights are counted once."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if main is None or not main.numel():
            return super().floating_point_ops(inputs)
        ops = self._ops or super().floating_point_ops(inputs) // int(main.numel())
        self._ops = ops
        return ops * int(main.numel())

    _ops: int | None = None  # for one entry of the main input: a whole number of them


def seed_cpu(seed: int) -> None:
    """What set_seed of transformers does where nothing runs on a device; that takes half a
    millisecond for asking after each kind of device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextmanager
def walked_once(module: nn.Module) -> Iterator[None]:
    """Within it, walks over all of a module's parameters or modules are over lists: for a training
    of one step transformers and accelerate walk ten times, which takes a millisecond each time.

    Parameters may change, but none may be replaced.
    """
    walks = ("named_modules", "named_parameters")  # the second takes the first
    for name in walks:
        vars(module)[name] = _listed(getattr(module, name))
    try:
        yield
    finally:
        for name in walks:
            del vars(module)[name]


def _listed(walk: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    found, usual = list(walk()), {"prefix": "", "recurse": True, "remove_duplicate": True}

    def listed(*args: Any, **given: Any) -> Iterator[Any]:
        whole = not args and given.items() <= usual.items()
        return iter(found) if whole else walk(*args, **given)

    return listed


class _Steps(TrainerCallback):
    def __init__(self, on_step: OnStep, losses: list[Tensor]) -> None:
        self._on_step, self._losses, self._looks = on_step, losses, Looks()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = self._looks.read(torch.stack(self._losses).sum()) if self._losses else None
        self._losses.clear()
        self._on_step(state.global_step, state.max_steps, loss)
