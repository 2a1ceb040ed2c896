"""One adapted layer: where its factors and weight lie in PEFT's module, and their orientation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.adapter import Factors, LayerShape
from fedex_lora.errors import RecipeError
from fedex_lora.model.inner import InnerLinear, with_inner
from fedex_lora.model.load import is_quantised
from fedex_lora.model.sparse import Sparse

ADAPTER = "default"  # PEFT's name for the one adapter of a model
_QUANTISED = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Layer:
    """An adapted layer.

    Attributes:
        name: Module path within the plain model.
        module: PEFT's layer.
        shape: Shape, rank and scale as configured; ΔW is out × in.
    """

    name: str
    module: Any
    shape: LayerShape

    @property
    def base(self) -> Any:
        """The plain layer that PEFT wrapped."""
        return self.module.get_base_layer()

    @property
    def embedding(self) -> bool:
        return isinstance(self.module, LoraEmbedding)

    @property
    def quantised(self) -> bool:
        return is_quantised(self.base)

    def oriented(self, weight: Tensor) -> Tensor:
        """A view of an out × in matrix in the layer's own layout, or the other way round.

        nn.Linear holds out × in; Conv1D in × out; nn.Embedding tokens × dimension, where its
        "in" is the number of tokens.
        """
        return weight.T if transposed(self.base) else weight

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r × in) and B (out × r), the model's own parameters."""
        if self.embedding:
            return self.module.lora_embedding_A[ADAPTER], self.module.lora_embedding_B[ADAPTER]
        return self.module.lora_A[ADAPTER].weight, self.module.lora_B[ADAPTER].weight

    @property
    def inner(self) -> InnerLinear | None:
        """What multiplies by R and B, where there is an R between B and A."""
        found = None if self.embedding else self.module.lora_B[ADAPTER]
        return found if isinstance(found, InnerLinear) else None

    @property
    def sparse(self) -> nn.Parameter | None:
        """The values of a sparse change of the weight, where there is one."""
        found = None if self.embedding else getattr(self.module.lora_B[ADAPTER], "sparse", None)
        return found.values if isinstance(found, Sparse) else None

    def write_sparse(self, values: Tensor | None) -> None:
        """Puts a sparse change beside the weight, or takes it away.

        Raises:
            UserError: An adapted embedding, whose input is no vector.
        """
        if self.embedding:
            if values is not None:
                raise RecipeError(
                    f"lora.target_modules: {self.name} is an embedding, whose weight has no sparse "
                    "change here; leave it out"
                )
            return
        where = self.module.lora_B[ADAPTER]
        if self.sparse is not None:
            where.sparse.handle.remove()
            del where.sparse
        if values is not None:
            where.sparse = Sparse(self.name, self.base, self.shape.out, self.shape.inp, values)

    def between(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters beside A and B, by name: `inner` and `scales` of R, and `sparse`."""
        found = [] if self.inner is None else self.inner.named_parameters()
        own = [(name, p) for name, p in found if name in ("inner", "scales")]
        return own if self.sparse is None else [*own, ("sparse", self.sparse)]

    def write_inner(self, inner: Tensor | None) -> None:
        """Puts R between B and A, or takes it away.

        Raises:
            UserError: An adapted embedding, whose factors are no modules.
        """
        if self.embedding and inner is not None:
            raise RecipeError(
                f"lora.target_modules: {self.name} is an embedding, where no matrix can be trained "
                "between A and B; leave it out"
            )
        if not self.embedding:
            held = self.module.lora_B[ADAPTER]
            new = with_inner(held, inner)
            if new is not held:
                self.module.lora_B[ADAPTER] = new

    def maps(self) -> list[Any]:
        """The modules that multiply by A and B; the layer itself where it does that."""
        if self.embedding:
            return [self.module]
        return [self.module.lora_A[ADAPTER], self.module.lora_B[ADAPTER]]

    def read(self) -> Factors:
        """Copies of the factors, float32 on the CPU, with the scale that PEFT applies."""
        a, b = (copy_of(p) for p in self.factors())
        return Factors(a, b, float(self.module.scaling[ADAPTER]))

    def write(self, new: Factors) -> None:
        """Makes `new` the layer's factors and scale, at whatever rank they have.

        Raises:
            UserError: If they do not fit the layer.
        """
        if new.A.shape != (new.rank, self.shape.inp) or new.B.shape != (self.shape.out, new.rank):
            raise RecipeError(
                f"{self.name}: factors A {tuple(new.A.shape)}, B {tuple(new.B.shape)} do not fit; "
                f"expected A (r, {self.shape.inp}) and B ({self.shape.out}, r)"
            )
        a, b = self.factors()
        if new.rank != a.shape[0]:
            a, b = self._resize(new.rank)
        with torch.no_grad():
            a.copy_(new.A)
            b.copy_(new.B)
        self.module.r[ADAPTER] = new.rank
        self.module.scaling[ADAPTER] = new.scale

    def _resize(self, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = self.factors()
        new_a = nn.Parameter(a.new_empty(rank, self.shape.inp), requires_grad=a.requires_grad)
        new_b = nn.Parameter(b.new_empty(self.shape.out, rank), requires_grad=b.requires_grad)
        if self.embedding:
            self.module.lora_embedding_A[ADAPTER] = new_a
            self.module.lora_embedding_B[ADAPTER] = new_b
            return new_a, new_b
        linear_a, linear_b = self.module.lora_A[ADAPTER], self.module.lora_B[ADAPTER]
        linear_a.weight, linear_b.weight = new_a, new_b
        linear_a.out_features = linear_b.in_features = rank
        return new_a, new_b


def make_layer(name: str, module: Any, *, rslora: bool, gaussian: bool, fixed_rank: bool) -> Layer:
    """The layer that PEFT built at `name`.

    Raises:
        UserError: If it is of a kind for which aggregation would not be exact.
    """
    base = module.get_base_layer()
    kind = type(base).__name__
    if type(module) not in (LoraLinear, LoraEmbedding) and type(module).__name__ not in _QUANTISED:
        raise RecipeError(
            f"lora.target_modules: {name} is a {kind}, adapted by PEFT's {type(module).__name__}; "
            "only Linear, Conv1D and Embedding layers can be; leave it out"
        )
    if module.lora_variant or any(module.lora_bias.values()) or any(module.use_dora.values()):
        raise RecipeError(f"lora: {name} is adapted by a variant of LoRA; only plain LoRA is exact")
    if "weight" not in dict(base.named_parameters(recurse=False)):
        raise RecipeError(f"lora.target_modules: {name} ({kind}) computes its weight; leave it out")
    if getattr(base, "max_norm", None) is not None:
        raise RecipeError(f"lora.target_modules: {name} rescales its weight (max_norm)")
    scale, rank = float(module.scaling[ADAPTER]), int(module.r[ADAPTER])
    shape = (int(module.out_features), int(module.in_features))
    std = 1.0 if isinstance(module, LoraEmbedding) else 1 / rank if gaussian else None
    return Layer(name, module, LayerShape(*shape, rank, scale, rslora, std, fixed_rank))


def transposed(base: nn.Module) -> bool:
    """Whether a plain layer holds its weight as in × out."""
    return isinstance(base, Conv1D | nn.Embedding)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy in float32 on the CPU that shares nothing with the original."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
