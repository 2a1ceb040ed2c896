"""The loss of a causal language model at its labelled positions alone.

Most of a step with a large vocabulary is the output layer, and a loss on the response needs few of
its rows. So the layers below it run as they are, and what follows them, the *head*, runs on the
hidden states of labelled positions, in chunks: only the logits of one chunk are there at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedex_lora.tasks.base import IGNORED

ROOM = 2**26  # logits of a chunk: 256 MiB in float32; the output layer is read anew for each
_PROBE = 8  # tokens by which a model is tried

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """What a causal language model makes of its last hidden states.

    It is the model's own forward pass with the layers below left out: whatever is done to logits
    there (soft-capping, scaling) or lies on the output layer (LoRA) is done here.

    Attributes:
        model: The plain transformers model.
        body: Its layers below the head.
        vocabulary: How many logits a position has.
    """

    model: Any
    body: Any
    vocabulary: int

    def logits(self, states: Tensor, output: Any) -> Tensor:
        """Positions × vocabulary, of hidden states (positions × width).

        Args:
            output: What the body returned; heads may want more of it than the states.
        """
        shown = copy.copy(output)
        shown["last_hidden_state"] = states[None]
        with _returning(self.body, shown):
            return self.model(return_dict=True).logits[0]

    def trained(self) -> list[nn.Parameter]:
        """Its parameters that are trained, those that it shares with the body too."""
        own = {id(p) for p in self.model.get_output_embeddings().parameters()}
        below = {id(p) for p in self.body.parameters()} - own
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in below]


@dataclass(frozen=True)
class Losses:
    """Of a batch's labelled tokens, in the order of rows and positions.

    Attributes:
        total: Their weighted sum, float32; it has gradients.
        each: Each token's, float32, without gradients.
        rows: The row that each token is in.
    """

    total: Tensor
    each: Tensor
    rows: Tensor

    def by_row(self, count: int) -> tuple[list[float], list[int]]:
        """Of each of `count` rows: the sum over its tokens, and their number."""
        sums = torch.zeros(count, device=self.rows.device).index_add_(0, self.rows, self.each)
        return sums.tolist(), self.rows.bincount(minlength=count).tolist()


def token_losses(
    head: Head,
    inputs: Mapping[str, Any],
    labels: Tensor,
    smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> Losses:
    """−log p(token | tokens before it) at labelled positions, in nats.

    Args:
        inputs: The model's, without labels.
        labels: Rows × tokens, as the model takes them: a position's logits are for the next token.
        smoothing: ε in (1 − ε)(−log p(token)) + ε · mean of −log p over the vocabulary.
        row_weights: By row: of its tokens in `total`; 1 by default.
    """
    output = head.body(**inputs)
    states = output.last_hidden_state[:, :-1]
    return losses_of(head, states, labels[:, 1:], output, smoothing, row_weights)


def losses_of(
    head: Head,
    states: Tensor,
    targets: Tensor,
    output: Any,
    smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> Losses:
    """The same of hidden states (rows × positions × width).

    Args:
        targets: Rows × positions, what is to be predicted at each, or `IGNORED`.
        output: What the body returned.
    """
    targets = targets.to(states.device)
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
    weights = None if row_weights is None else row_weights.to(states.device)[rows]
    work = _Work(head, output, targets[rows, positions], weights, smoothing)
    chosen, parameters = states[rows, positions], head.trained()
    if torch.is_grad_enabled() and (chosen.requires_grad or parameters):
        total, each = cast(Any, _Chunked.apply(work, chosen, *parameters))
    else:
        each = chosen.new_empty(len(chosen), dtype=torch.float32)
        for chunk in work.chunks():
            each[chunk], _ = work.losses(head.logits(chosen[chunk], output), chunk)
        total = work.summed(each)
    return Losses(total, each, rows)


@dataclass(frozen=True)
class _Work:
    """What is computed of hidden states, but for them."""

    head: Head
    output: Any
    targets: Tensor
    weights: Tensor | None
    smoothing: float

    def chunks(self) -> Iterator[slice]:
        size = max(1, ROOM // self.head.vocabulary)
        for start in range(0, len(self.targets), size):
            yield slice(start, start + size)

    def losses(self, logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Each token's loss, log Σ exp z − z of the token, and p = softmax(z)."""
        z = logits.detach().float()
        p = functional.softmax(z, dim=-1)
        top, largest = z.amax(dim=-1, keepdim=True), p.amax(dim=-1, keepdim=True)
        log_sum = top - largest.log()  # the largest p is no smaller than 1 / vocabulary
        found = log_sum - z.gather(1, self.targets[chunk, None])
        if self.smoothing:
            even = log_sum - z.mean(dim=-1, keepdim=True)
            found = (1 - self.smoothing) * found + self.smoothing * even
        return found[:, 0], p

    def slopes(self, p: Tensor, chunk: slice, weighted: bool) -> Tensor:
        """∂ total / ∂ z = weight · (p − (1 − ε) · onehot − ε / vocabulary), in the place of `p`.

        Without parameters that sum over tokens, weights can wait for the gradients of states, as
        the divisor of a batch's loss does.
        """
        if self.smoothing:
            p -= self.smoothing / self.head.vocabulary
        onehot = torch.full_like(p[:, :1], 1 - self.smoothing)
        p.scatter_add_(1, self.targets[chunk, None], -onehot)
        return p.mul_(self.weights[chunk, None]) if weighted and self.weights is not None else p

    def summed(self, each: Tensor) -> Tensor:
        return each.sum() if self.weights is None else each @ self.weights


class _Chunked(torch.autograd.Function):
    """Losses and, in the same pass over the chunks, their gradients, which backward only scales:
    nothing is computed twice, and no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, work: _Work, states: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        each = states.new_empty(len(states), dtype=torch.float32)
        found = torch.zeros_like(states) if states.requires_grad else None
        sums: list[Tensor | None] = [None] * len(parameters)
        for chunk in work.chunks():
            part = states[chunk].detach().requires_grad_(states.requires_grad)
            with torch.enable_grad():
                logits = work.head.logits(part, work.output)
            each[chunk], p = work.losses(logits, chunk)
            slopes = work.slopes(p, chunk, bool(parameters)).to(logits.dtype)
            asked = [*([part] if found is not None else []), *parameters]
            with torch.autocast(states.device.type, enabled=False):
                grads = list(torch.autograd.grad(logits, asked, slopes, allow_unused=True))
            if found is not None:
                found[chunk] = grads.pop(0)
            for i, grad in enumerate(grads):
                if grad is not None:
                    before = sums[i]
                    sums[i] = grad.float() if before is None else before.add_(grad)
        if found is not None and work.weights is not None and not parameters:
            found *= work.weights[:, None].to(found)
        ctx.grads = found, *(s if s is None else s.to(p) for s, p in zip(sums, parameters))
        ctx.mark_non_differentiable(each)
        return work.summed(each), each

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, *(g if g is None else g * outer[0].to(g) for g in ctx.grads)


def is_causal(module: nn.Module) -> bool:
    """Whether a model, PEFT's or a plain one, is one that predicts the next token."""
    return any(name in type(_plain(module)).__name__ for name in ("CausalLM", "LMHead"))


def _plain(module: nn.Module) -> Any:
    return cast(Any, module).get_base_model() if hasattr(module, "get_base_model") else module


def head_of(module: nn.Module, tokens: Tensor) -> Head | None:
    """The head of a causal language model, PEFT's or a plain one; None where its loss is not one of
    its head's logits alone, with a warning, once.

    What a class does in its forward pass is not known, so a model is tried, once: do body and head
    give its logits, and these its loss?

    Args:
        tokens: Of a batch (rows × tokens), of which a few are put through the model.
    """
    if module not in _heads:
        model = _plain(module)
        found = _tried(model, tokens[:1, :_PROBE])
        if isinstance(found, str):
            name = type(model).__name__
            logger.warning("%s: %s; logits are computed at all positions", name, found)
        _heads[module] = found if isinstance(found, Head) else None
    return _heads[module]


def frozen_head(module: nn.Module, rows: Any) -> Head | None:
    """`head_of` a causal language model that trains nothing of its head; None for any other.

    So gradients of each row or each client, which are taken in the trained layers, are what they
    would be with all logits.

    Args:
        rows: Encoded, at least one.
    """
    if not is_causal(module):
        return None
    device = next(module.parameters()).device
    head = head_of(module, torch.tensor([rows[0]["input_ids"]], device=device))
    return None if head is None or head.trained() else head


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def _tried(model: Any, tokens: Tensor) -> Head | str:
    """The head, or why there is none."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return "it has no output layer of the usual kind"
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _bodies(model) as found:
            own = model(input_ids=tokens, labels=tokens)
        if not found:
            return "what its output layer follows is not known"
        body, output = found[-1]
        head = Head(model, body, own.logits.shape[-1])
        with torch.no_grad():
            logits = head.logits(output.last_hidden_state[0], output)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        return f"its output layer cannot be run by itself ({str(error).partition(chr(10))[0]})"
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not torch.allclose(logits.float(), own.logits[0].float(), rtol=1e-3, atol=1e-4):
        return "its logits are not those of its output layer on the last hidden states"
    # decoders made for translation take labels of the next tokens, so that of ours their loss would
    # be that of the token itself
    z, asked = own.logits[0].float(), tokens[0]
    usual = functional.cross_entropy(z[:-1], asked[1:]), functional.cross_entropy(z, asked)
    if not any(torch.allclose(loss, own.loss.float(), rtol=1e-5) for loss in usual):
        return "its loss is one of its own"
    return head


@contextmanager
def _bodies(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The modules that return hidden states, and these, in the order in which they end: the last
    one is what the head follows."""
    found: list[tuple[nn.Module, Any]] = []

    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        if module is not model and hasattr(output, "last_hidden_state"):
            found.append((module, output))

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning(body: Any, output: Any) -> Iterator[None]:
    """The body returns this, whatever it is asked."""
    own = vars(body).get("forward")  # some libraries put one there
    body.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
