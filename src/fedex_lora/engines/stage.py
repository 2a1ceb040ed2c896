"""The one resident model of a process, and what lies on it at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset

from fedex_lora.aggregation.adapter import AdapterState, Factors, mixed
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.methods import Method
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, base_increment, global_factors, start_of
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks import Task
from fedex_lora.tasks.outputs import VerdictFile


class Stage:
    """A model on which clients take turns, and which the server scores.

    Args:
        outputs: A folder for the texts that are generated when models are scored; None for none.
    """

    def __init__(
        self,
        model: AdaptedModel,
        task: Task,
        method: Method,
        batch_size: int = 64,
        outputs: Path | None = None,
    ) -> None:
        self.model, self.task, self.method = model, task, method
        self.batch_size, self.outputs = batch_size, outputs
        self._placed: tuple[Ledger, Mapping[str, Factors] | None] | None = None

    def place(
        self,
        ledger: Ledger,
        start: AdapterState | None = None,
        part: Mapping[str, Factors] | None = None,
    ) -> None:
        """base = cast(W0 + T − own); nothing to do where it is so already.

        Args:
            start: Of the client whose turn it is; only its own base depends on it.
            part: In the place of its own factors, others that are taken off.
        """
        own = None if self.method.shared_base or start is None else start.layers
        own = own if part is None else part
        placed, whose = self._placed or (None, None)
        if placed is ledger and whose is own:
            return
        fold = not self.model.beside
        self.model.place(
            lambda name: base_increment(ledger, name, None if own is None else own[name], fold)
        )
        self._placed = (ledger, own)

    def show(self, ledger: Ledger, adapter: AdapterState, own: bool = True) -> None:
        """Makes the model what a client starts from, or the global one where not `own`."""
        self.place(ledger, adapter if own else None)
        self.model.write(mixed(adapter))

    def show_global(
        self, state: ServerState, settings: Settings, client: str | None = None
    ) -> None:
        """Makes the model the global one; or `client`'s, where every client has a model alone."""
        if client is not None:
            self.show(state.ledger, start_of(state, settings, client), own=False)
            return
        factors = dict(global_factors(state, settings)) or {
            name: Factors(torch.zeros_like(f.A), torch.zeros_like(f.B), f.scale)
            for name, f in state.factors.items()
        }
        self.show(state.ledger, AdapterState(factors, state.head), own=False)

    def score(self, rows: Dataset, version: int, *whose: str) -> dict[str, float]:
        """The scores of what the model is now; generated texts are kept.

        Args:
            version: Of the state that the model shows.
            whose: Where below the round's folder of `outputs`, the last one being the file.
        """
        *folders, name = f"{version:04d}", *whose
        kept = self.outputs and VerdictFile(self.outputs.joinpath(*folders, f"{name}.jsonl"))
        model = self.model
        return self.task.evaluate(model.module, rows, model.tokenizer, self.batch_size, kept)
