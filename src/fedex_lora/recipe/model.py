"""The model, its adapters, and how updates are aggregated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedex_lora.aggregation.methods import METHODS, Method, Option, get_method
from fedex_lora.errors import UserError
from fedex_lora.recipe.part import LocalPath, Part, Problem


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
    rank_pattern: dict[str, int] = Field(default={})
    alpha_pattern: dict[str, float] = Field(default={})
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
    options: dict[str, Option] = Field(default={})  # of its assignment, e.g. {energy: 0.9}

    @property
    def chosen(self) -> Method:
        """The method with its options."""
        return get_method(self.name).with_options(self.options)

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
            having = ", ".join(name for name, m in METHODS.items() if m.residual == "truncated")
            yield "rank", f"{self.name} does not cut its residual; only {having} takes a rank"
        for name, value in self.options.items():
            try:
                method.with_options({name: value})
            except UserError as error:
                yield f"options.{name}", str(error).removeprefix(f"method.options.{name}: ")
