"""The blocks that a recipe has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fedex_lora.recipe.data import DataSpec
from fedex_lora.recipe.extensions import OURS, TRAIN_FUNCTIONS, TRANSPORTS
from fedex_lora.recipe.federation import FederationSpec
from fedex_lora.recipe.model import LoraSpec, MethodSpec, ModelSpec
from fedex_lora.recipe.part import Part, Problem, check, did_you_mean
from fedex_lora.recipe.privacy import Privacy
from fedex_lora.recipe.refused import REFUSED_TRAINING
from fedex_lora.recipe.task import TaskBlock


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
    spectrum: int = Field(default=0, ge=0)  # singular values of each layer's change, every round


class EngineSpec(Part):
    """How messages are carried: in this process, or by Flower, across machines or simulated."""

    kind: str = "local"  # or flower, flower-simulation, or a registered one
    threads: int = Field(default=1, ge=1, le=1024)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"  # bfloat16: training's autocast
    fuse: Annotated[int, Field(ge=1)] | Literal["auto"] = 1  # local: clients trained in one pass
    train: str | None = None  # a registered training loop; None: the Trainer
    client_cpus: int = Field(default=1, ge=1)  # flower-simulation: of each client that trains
    client_gpus: float = Field(default=0.0, ge=0)

    def problems(self) -> Iterator[Problem]:
        known = [*OURS, *TRANSPORTS]
        if self.kind not in known:
            yield "kind", f"expected {_one_of(self.kind, known)}"
        if self.train is not None and self.train not in TRAIN_FUNCTIONS:
            yield "train", f"expected {_one_of(self.train, TRAIN_FUNCTIONS)}"


def _one_of(name: str, known: Iterable[str]) -> str:
    names = ", ".join(known) or "those that are registered, of which there are none"
    return f"one of {names}, got {name!r}{did_you_mean(name, known)}"


class Blocks(Part):
    """The blocks of a recipe, each right by itself."""

    name: str
    seed: int = Field(default=0, ge=0)
    model: ModelSpec
    lora: LoraSpec = LoraSpec()
    method: MethodSpec = MethodSpec()
    federation: FederationSpec = FederationSpec()
    task: TaskBlock
    data: DataSpec
    training: dict[str, Any] = Field(default={})
    evaluation: EvaluationSpec = EvaluationSpec()
    privacy: Privacy = Privacy()
    records: RecordsSpec = RecordsSpec()
    engine: EngineSpec = EngineSpec()

    @field_validator("training")
    @classmethod
    def _training(cls, training: dict[str, Any]) -> dict[str, Any]:
        check((key, why) for key, why in REFUSED_TRAINING.items() if key in training)
        return training

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """`training`, and autocast where `engine.precision` asks for it."""
        half = {"bf16": True} if self.engine.precision == "bfloat16" else {}
        return {**self.training, **half}
