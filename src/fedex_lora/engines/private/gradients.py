"""Each example's own gradient, by Opacus; and whether it is that of the example alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedex_lora.engines.private.losses import Losses, logits_losses
from fedex_lora.errors import RecipeError
from fedex_lora.federation.messages import norm_of
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.layer import ADAPTER, Layer
from fedex_lora.tasks.base import Batch

_root, _there = logging.getLogger(), logging.NullHandler()
_root.addHandler(_there)  # else Opacus gives the whole process a log on stderr
from opacus.grad_sample import GradSampleModule  # noqa: E402

_root.removeHandler(_there)

TOLERANCE = 1e-3  # of a gradient's norm, in float32; what depends on others is far off
COARSE = 0.1  # the same where the frozen weights are of 16 bits or fewer


@contextmanager
def per_example(model: AdaptedModel) -> Iterator[None]:
    """While it lasts, a backward pass from a sum of losses leaves in `grad_sample` of each trained
    parameter the gradient of every example: rows × the parameter's shape.

    Modules have to be in training mode: in evaluation mode Opacus records nothing.
    """
    module = model.module
    with ExitStack() as stack:
        # PEFT keeps the factors of an embedding as bare parameters, of which Opacus sees nothing
        bare = [p for layer in model.embeddings() for p in layer.factors() if p.requires_grad]
        for parameter in bare:
            parameter.requires_grad_(False)
        wrapped = GradSampleModule(module, loss_reduction="sum", strict=True)
        stack.callback(wrapped.to_standard_module)
        for parameter in bare:
            parameter.requires_grad_(True)
            stack.callback(_forget, parameter)
        for layer in model.embeddings():
            stack.enter_context(_embedding(layer))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _forget(parameter: nn.Parameter) -> None:
    if hasattr(parameter, "grad_sample"):
        delattr(parameter, "grad_sample")


@contextmanager
def _embedding(layer: Layer) -> Iterator[None]:
    """y = base(x) + s·B·A[:, x], so with g = ∂L/∂y an example's gradient of B is s·Σ g·A[:, x]ᵀ,
    and that of A has s·Bᵀg added to the column of each of its tokens."""
    a, b = layer.factors()

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: _grad_samples(layer, a, b, args[0], g))

    handle = layer.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _grad_samples(
    layer: Layer, a: nn.Parameter, b: nn.Parameter, tokens: Tensor, g: Tensor
) -> None:
    factors = layer.module
    scale = factors.scaling[ADAPTER]
    embed_scale = factors._get_embed_scale()  # Gemma 3 scales inside its embedding layer
    g = g.detach().float() * scale * (1.0 if embed_scale is None else embed_scale.float())
    if b.requires_grad:
        rows = a.detach().T[tokens]  # examples × tokens × r
        b.grad_sample = torch.einsum("nto,ntr->nor", g, rows)  # pyright: ignore
    if a.requires_grad:
        back = g @ b.detach()  # examples × tokens × r
        padding = factors.get_base_layer().padding_idx
        if padding is not None:  # of which torch takes no gradient
            back = back * tokens.ne(padding).unsqueeze(-1)
        found = back.new_zeros(len(tokens), a.shape[1], a.shape[0])
        index = tokens.unsqueeze(-1).expand_as(back)
        a.grad_sample = found.scatter_add_(1, index, back).transpose(1, 2)  # pyright: ignore


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradients(
    model: AdaptedModel,
    batch: Mapping[str, Tensor],
    regression: bool,
    losses: Losses | None = None,
) -> dict[str, Tensor | None]:
    """Each example's gradients by parameter, without dropout; None where Opacus saw none.

    Only what is trained is in training mode: attention that drops out would not repeat.
    """
    module = model.module
    modes = {m: m.training for m in module.modules()}
    module.eval()
    for m in module.modules():
        own = any(p.requires_grad for p in m.parameters(recurse=False))
        m.training = own and not isinstance(m, nn.Dropout)
    try:
        with per_example(model):
            there = {k: v.to(model.device) for k, v in batch.items()}
            if losses is None:
                each = logits_losses(module, there, regression)
            else:
                each = losses(module, there)
            each.sum().backward()
            found = {name: getattr(p, "grad_sample", None) for name, p in trained(module).items()}
    finally:
        for m, mode in modes.items():
            m.training = mode
        module.zero_grad(set_to_none=True)
    return found


def check_gradients(
    model: AdaptedModel,
    rows: Sequence[Batch],
    whole: Batch,
    regression: bool,
    losses: Losses | None = None,
) -> None:
    """Whether the gradient of every example in a batch is that of the example by itself.

    Where it is not, or Opacus passes over a parameter, clipping would bound nothing, and noise
    hide nothing.

    Args:
        rows: Batches of one example.
        whole: The batch of them all.
        losses: Of one's own; by default those of the logits.

    Raises:
        UserError: A parameter's is not; it is named.
    """
    try:
        together = gradients(model, whole, regression, losses)
        alone = [gradients(model, row, regression, losses) for row in rows]
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"privacy.example_level: Opacus cannot take this model's gradients by example: {error}"
        ) from error
    # a gradient of zero, as of what a softmax does not see, is of rounding alone
    whole_norm = norm_of(t for one in alone for t in one.values() if t is not None)
    zero = torch.finfo(torch.float32).eps * whole_norm
    for name, found in together.items():
        owner = name.removeprefix("base_model.model.").rpartition(".")[0]
        remedy = (
            f"leave {owner.split('.lora_')[0]} out of lora.target_modules and "
            "lora.modules_to_save, or take another model"
        )
        if found is None or any(one[name] is None for one in alone):
            raise RecipeError(
                f"privacy.example_level: Opacus has no gradient by example of {name}, so noise "
                f"would protect nothing there; {remedy}"
            )
        if len(found) != len(rows):
            raise RecipeError(
                f"privacy.example_level: {name} is not computed row by row ({len(found)} gradients "
                f"of {len(rows)} rows); {remedy}"
            )
        single = torch.cat([one[name] for one in alone])  # pyright: ignore
        off = (found - single).norm().item()
        coarse = any(p.dtype != torch.float32 for p in model.module.parameters())
        most = COARSE if coarse else TOLERANCE
        if not off <= most * single.norm().item() + zero:
            raise RecipeError(
                f"privacy.example_level: the gradient of a row's {name} depends on the other rows "
                f"of its batch ({off / (single.norm().item() or 1):.2g} off); {remedy}"
            )
