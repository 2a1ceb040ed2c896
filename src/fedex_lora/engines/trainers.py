"""How clients train, as Python says it: by transformers.Trainer, or by DP-SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from fedex_lora.engines.training import HFTrainer as Trainer
from fedex_lora.engines.turn import Trained, Turn
from fedex_lora.errors import UserError, check_installed
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe.differential import unfit_arguments
from fedex_lora.recipe.privacy import ExampleLevel
from fedex_lora.tasks.base import Collate

if TYPE_CHECKING:
    from fedex_lora.engines.private.losses import Losses


class HFTrainer:
    """Trains clients by transformers.Trainer, one after the other.

    Args:
        collate: Makes a batch of rows; by default they are padded, labels by −100.
        training: Arguments of TrainingArguments.
    """

    together = 1

    def __init__(self, collate: Collate | None = None, **training: Any) -> None:
        self.collate, self.training = collate, training

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        return Trainer(Batches(self.collate), self.training)(model, turns)


@dataclass(frozen=True)
class Batches:
    """How rows become batches where there is no task."""

    collate: Collate | None = None
    image: bool = False
    regression: bool = False

    def collator(self, tokenizer: Any) -> Collate:
        if self.collate is not None:
            return self.collate
        return partial(
            _padded, DataCollatorWithPadding(tokenizer), DataCollatorForSeq2Seq(tokenizer)
        )


def _padded(single: Collate, sequences: Collate, rows: list[dict[str, Any]]) -> Any:
    listed = isinstance(rows[0].get("labels"), list)
    return (sequences if listed else single)(rows)


class PrivateTrainer(HFTrainer):
    """Trains clients by DP-SGD (arXiv 1607.00133): what they come to, and so all that is made of
    it, hides whether any one row was among a client's.

    In each step every row is drawn with probability L/n by itself, and with gradients gᵢ

        g = (Σ over the drawn rows of min(1, C/‖gᵢ‖)·gᵢ  +  σ·C·N(0, 1)) / L

    is what the optimizer gets; L = per_device_train_batch_size · gradient_accumulation_steps. The
    optimizer and its schedule are those of TrainingArguments.

    Args:
        delta: δ.
        epsilon: ε that no client exceeds, over all rounds that this object trains.
        rounds: That a client takes part in; σ is found so that ε is enough for them.
        noise_multiplier: σ, where it is given and not found.
        max_grad_norm: C.
        loss: (module, batch) → the loss of each row, a vector; by default the cross-entropy of the
            logits (the squared error with one label), averaged within a row.
        collate: As of `HFTrainer`.
        rehearsal: Draws and noise are functions of the federation's seed: for tests, not private.
        training: Arguments of TrainingArguments.

    Raises:
        UserError: An option that does not go with DP-SGD; when it trains, a turn beyond ε, or a
            module whose gradients of one row depend on others.

    Example:
        >>> trainer = PrivateTrainer(delta=1e-5, epsilon=8, rounds=5, learning_rate=1e-2)
        >>> trainer.spent()
        {}
    """

    def __init__(
        self,
        delta: float,
        epsilon: float | None = None,
        rounds: int | None = None,
        *,
        noise_multiplier: float | None = None,
        max_grad_norm: float = 1.0,
        loss: Losses | None = None,
        collate: Collate | None = None,
        rehearsal: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(collate, **training)
        for module in ("opacus", "dp_accounting"):
            check_installed(module, "PrivateTrainer")
        from fedex_lora.engines.private.account import Accounts  # noqa: PLC0415

        if noise_multiplier is None and (epsilon is None or not rounds):
            raise UserError(
                "PrivateTrainer: gives no noise; expected epsilon and rounds, or noise_multiplier"
            )
        for name, why in unfit_arguments(training):
            raise UserError(f"PrivateTrainer: {name}: {why}")
        try:
            self.spec = ExampleLevel(
                epsilon=epsilon,
                delta=delta,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"PrivateTrainer: {'.'.join(map(str, first['loc']))}: {first['msg']}, got "
                f"{first['input']}"
            ) from None
        self.turns, self.loss, self.rehearsal = rounds or 1, loss, rehearsal
        self.account = Accounts(delta, epsilon)
        self._tried: AdaptedModel | None = None

    def spent(self) -> dict[str, float]:
        """ε of each client so far."""
        return {client: self.account.told(client) for client in sorted(self.account.spent)}

    def kept(self) -> dict[str, list[list[float]]]:
        """The account as JSON, for a checkpoint."""
        from fedex_lora.engines.private.account import as_json  # noqa: PLC0415

        return {client: as_json(steps) for client, steps in self.account.spent.items()}

    def take_up(self, kept: Mapping[str, Any]) -> None:
        """Goes on with an account that `kept` gave."""
        from fedex_lora.engines.private.account import from_json  # noqa: PLC0415

        self.account.spent = {client: from_json(steps) for client, steps in kept.items()}

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        from fedex_lora.engines.private import train  # noqa: PLC0415
        from fedex_lora.engines.private.begin import try_rows  # noqa: PLC0415
        from fedex_lora.engines.private.plan import plan  # noqa: PLC0415

        regression = getattr(getattr(model.module, "config", None), "num_labels", None) == 1
        batches = Batches(self.collate, regression=regression)
        noise: dict[str, float] = {}
        for turn in turns:
            if turn.gradients or turn.pruning is not None:
                raise UserError(
                    "method: asks of a client what DP-SGD does not do (gradients of whole weights, "
                    "or a penalty); take another method"
                )
            if self._tried is not model:
                collate = batches.collator(model.tokenizer)
                try_rows(model, collate, turn.rows, turn.start, regression, self.loss)
                self._tried = model
            rows, schedule = {turn.client: len(turn.rows)}, [[turn.client]] * self.turns
            noise |= plan(self.spec, self.training, rows, schedule).noise
        bound = self.spec.max_grad_norm
        way = train.PrivateTrainer(
            batches, self.training, bound, noise, self.account, self.rehearsal, losses=self.loss
        )
        return way(model, turns)
