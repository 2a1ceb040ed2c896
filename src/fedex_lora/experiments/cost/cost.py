"""What each method sends, in numbers and in bytes, for a model of which only the shapes are known.

Every figure comes from a `DryRun`, so it counts what a run counts: messages both ways, and the
delivery of the final model. The pretrained model, which every client needs once before the first
round, is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedex_lora.aggregation.methods import METHODS, Method, get_method
from fedex_lora.data.partition import client_names
from fedex_lora.engines.setup import POOLED
from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.study import is_exact_average
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.model.architectures import Architecture, architecture, natural_task, read_config
from fedex_lora.recipe import LoraSpec
from fedex_lora.runs.plan.traffic import DryRun, Size, summed


@dataclass(frozen=True)
class Shapes:
    """One model, as LoRA and as full fine-tuning see it."""

    adapted: Architecture
    full: Architecture


@dataclass(frozen=True)
class Cost:
    """What one method sends over a whole federation.

    Attributes:
        clients: How many there are; one, where the data are pooled.
        up, down: All messages of all rounds and clients; `down` with the final delivery.
        model: The pretrained model, once to every client.
    """

    method: str
    clients: int
    rounds: int
    up: Size
    down: Size
    model: Size

    @property
    def total(self) -> Size:
        """Without the pretrained model."""
        return self.up + self.down

    @property
    def with_model(self) -> Size:
        return self.total + self.model


def shapes(name: str, lora: LoraSpec, labels: int | None = None) -> Shapes:
    """A model's shapes, adapted and in full, for what it is usually fine-tuned for.

    Args:
        name: As for `fedex_lora.model.architectures.read_config`.
        lora: What to adapt.
        labels: Of a classification; see `natural_task`.
    """
    auto_model, task_type, kwargs = natural_task(read_config(name), labels)
    adapted, full = (
        architecture(
            name, spec, auto_model=auto_model, peft_task_type=task_type, model_kwargs=kwargs
        )
        for spec in (lora, None)
    )
    return Shapes(adapted, full)


def trained(method: Method, model: Shapes) -> Architecture:
    """The view of the model that a method trains."""
    return model.full if method.trains == "all" else model.adapted


def settings(
    method: Method,
    model: Shapes,
    *,
    clients: int,
    rounds: int,
    residual_rank: int | None = None,
    wire_dtype: torch.dtype = torch.float32,
) -> Settings:
    """A federation in which all clients take part in every round.

    Args:
        residual_rank: r' of a truncated residual; by default the largest rank of the adapter.
    """
    layers = trained(method, model).layers
    widest = max((layer.rank for layer in layers.values()), default=0)
    names = [POOLED] if method.pooled else client_names(clients)
    return Settings(
        method,
        seed=0,
        clients=tuple(names),
        layers=layers,
        rounds=rounds,
        rank=widest if residual_rank is None else residual_rank,
        wire_dtype=wire_dtype,
    )


def costs(
    model: Shapes,
    methods: Iterable[str] = METHODS,
    *,
    clients: int,
    rounds: int,
    residual_rank: int | None = None,
    wire_dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype = torch.float32,
    secure: bool = False,
) -> list[Cost]:
    """The cost of several methods, each played by a `DryRun`.

    Args:
        residual_rank: See `settings`.
        model_dtype: Of the pretrained model when it is handed out.
        secure: Whether the server is to see sums alone.

    Raises:
        UserError: A method is unknown, or sums do not suffice for it.

    Example:
        >>> model = shapes("roberta-large", LoraSpec(r=4, target_modules=["query", "value"]))
        >>> plain, exact = costs(model, ["fedit", "fedex"], clients=3, rounds=5)
        >>> (exact.total.numbers - plain.total.numbers) // (3 * 5)  # rank (3 − 1)·4 of 48 layers
        786432
    """
    found = []
    for name in dict.fromkeys(methods):
        method = get_method(name)
        federation = settings(
            method,
            model,
            clients=clients,
            rounds=rounds,
            residual_rank=residual_rank,
            wire_dtype=wire_dtype,
        )
        if secure:
            if (why := method.unfit_for_sums()) is not None:
                raise UserError(f"method: {name} {why}")
            federation = replace(federation, secure=Secure())
        run = DryRun(federation, trained(method, model).head)
        played = [run.round() for _ in range(rounds)]
        up, down = (summed(s for r in played for s in r[way].values()) for way in (0, 1))
        delivery = summed(run.down(client) for client in federation.clients)
        k = len(federation.clients)
        once = Size(k * model.adapted.size, k * model.adapted.size * model_dtype.itemsize)
        found.append(Cost(name, k, rounds, up, down + delivery, once))
    return found


def reference() -> str:
    """The method that others are compared with: exact averaging of both factors.

    Example:
        >>> reference()
        'fedex'
    """
    return next(name for name, method in METHODS.items() if is_exact_average(method))


Table = tuple[list[str], list[list[str]]]


def ratio(part: float, whole: float) -> str:
    """part / whole for people; "-" if there is no whole.

    Example:
        >>> ratio(984, 1000), ratio(10396, 1000), ratio(1, 0)
        ('.984', '10.396', '-')
    """
    return "-" if not whole else f"{part / whole:.3f}".removeprefix("0")


def millions(number: float) -> str:
    """A number of parameters for people.

    Example:
        >>> millions(393216), millions(0)
        ('0.393M', '0')
    """
    return f"{number / 1e6:,.3f}M" if number else "0"
