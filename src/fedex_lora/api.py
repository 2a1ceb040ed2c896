"""The program as Python calls: a model, a federation of its clients, rounds.

    model = fl.Model.from_pretrained("FacebookAI/roberta-base", LoraConfig(r=4), num_labels=2)
    federation = fl.Federation(model, {"a": rows_a, "b": rows_b}, train=fl.HFTrainer())
    for round in federation.rounds(5):
        print(round.number, round.deviation)
    federation.save_adapter("out")

Rows are `datasets.Dataset`s that are encoded already, as for transformers.Trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from fedex_lora.aggregation.adapter import AdapterState, folded, fresh, uniform
from fedex_lora.aggregation.methods import Method, get_method
from fedex_lora.disk import new_directory
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.own_loop import OwnLoop
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.trainers import Batches, HFTrainer, PrivateTrainer
from fedex_lora.engines.training import score
from fedex_lora.engines.turn import Train, Trained, Transform
from fedex_lora.errors import UserError
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.settings import Settings, check_options
from fedex_lora.federation.state import ServerState, begin, global_factors, start_of
from fedex_lora.model.given import Model
from fedex_lora.runs.bar import Barred
from fedex_lora.runs.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fedex_lora.runs.export import as_adapter, check_finite
from fedex_lora.runs.records import Round, Rounds

_POOLED = "all"  # the one client of a method that pools the rows


class Federation:
    """Clients that take turns on one model in this process, and the server of them.

    Args:
        model: Loaded by `Model.from_pretrained`, or made of a module of one's own.
        clients: Each client's rows. Columns that the model does not take are left out. With a
            module of one's own, anything that has a length and that `train` takes.
        method: Its name, or one of one's own.
        train: How a client trains: an `HFTrainer`, a `PrivateTrainer`, or a function
            `train(module, rows, *, round, client, rng)` that trains the module in place and returns
            a `Trained`.
        transform: What becomes of an update before it is sent; see `chain`.
        seed: Everything random derives from it.
        ranks: One LoRA rank a client, where the method allows it.
        options: Further fields of `Settings`: `rank` and `carry` of a truncated residual,
            `weights`, `server_learning_rate`, `clients_per_round`, `min_clients`, `wire_dtype`,
            `norm_ratio`, ...

    Attributes:
        state: The server's.
        history: The rounds so far.
    """

    def __init__(
        self,
        model: Model,
        clients: Mapping[str, Any],
        method: str | Method = "fedex",
        train: HFTrainer | Callable[..., Trained] | Train | None = None,
        *,
        transform: Transform | None = None,
        seed: int = 0,
        ranks: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        chosen = get_method(method)
        if not isinstance(clients, Mapping):
            raise UserError(
                f"clients: expected rows by client, {{name: Dataset}}, got {type(clients).__name__}"
            )
        rows = {name: _inputs(model, part, name) for name, part in clients.items()}
        if not rows:
            raise UserError("clients: there are none; expected rows by client, {name: Dataset}")
        way = _way(train, model)
        if chosen.pooled:
            rows = {_POOLED: _pooled(rows)}
        if ranks and not chosen.ranks_may_differ:
            raise UserError(f"ranks: {method} needs one rank for all clients; leave them out")
        if ranks and ranks.keys() != rows.keys():
            raise UserError(f"ranks: expected one for each of {', '.join(sorted(rows))}")
        check_options(options, "Federation")
        if chosen.residual == "truncated" and options.get("rank") is None:
            raise UserError(f"rank: {method} needs the rank its residual is cut to")
        adapted = model.adapted
        widest = max((ranks or {}).values(), default=0)
        layers = {n: s.at_rank(widest) if widest else s for n, s in adapted.layers.items()}
        self.model = model
        self.settings = Settings(
            chosen,
            seed,
            tuple(sorted(rows)),
            layers,
            0,
            ranks or {},
            **{
                "examples": {name: len(part) for name, part in rows.items()},
                "norm_ratio": 10.0,
                **options,
            },
        )
        check_shares(self.settings)
        initial = AdapterState(fresh(layers, seed), dict(model.head))
        stage = Stage(adapted, cast(Any, None), chosen)
        self.engine = LocalEngine(stage, rows, self.settings, initial, way, transform=transform)
        self.state: ServerState = begin(self.settings, initial)
        self.history = Rounds()

    def rounds(self, count: int, progress: bool = False) -> Iterator[Round]:
        """Plays so many rounds more; each is done when it is yielded.

        The last of them sends whole what a truncated residual still carries.

        Args:
            progress: Whether to show rounds, clients, loss and time left: a bar of tqdm's in a
                notebook and on a terminal, else a line a round.

        Raises:
            QuorumLost: Fewer than `min_clients` updates can be used; each reason is named.
        """
        settings = replace(self.settings, rounds=self.state.version + count)
        self.settings = self.engine.settings = settings
        bar = Barred(self.engine, count, len(settings.sample(1))) if progress else None
        try:
            for _ in range(count):
                self.state, record = run_round(self.state, settings, bar or self.engine)
                if bar is not None:
                    bar.round_done()
                self.history.append(Round(self.state.version, record))
                yield self.history[-1]
        finally:
            if bar is not None:
                bar.close()

    def show(self, client: str | None = None) -> nn.Module:
        """The module as the global model; or `client`'s, where every client has a model alone."""
        self._adapter(client)
        self.engine.stage.show_global(self.state, self.settings, client)
        return self.model.module.eval()

    def evaluate(
        self,
        rows: Dataset,
        metric: Callable[[Any], Mapping[str, float]] | None = None,
        *,
        client: str | None = None,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """The loss of the global model on encoded rows, and what `metric` tells.

        Args:
            metric: As `compute_metrics` of transformers.Trainer: of predictions and labels.
            client: As of `show`.

        Raises:
            UserError: The model is a module of one's own, which `show` gives to score it.
        """
        train = self.engine.train_with
        if self.model.tokenizer is None and not isinstance(train, HFTrainer):
            raise UserError(
                "evaluate: is transformers.Trainer's; score the module that `show` gives, "
                "as it was trained"
            )
        self.show(client)
        batches = Batches(train.collate if isinstance(train, HFTrainer) else None)
        kept = _inputs(self.model, rows, "evaluate")
        return score(self.model.adapted, batches, kept, batch_size, metric)

    def save_adapter(
        self, path: str | Path, rank: int | None = None, client: str | None = None
    ) -> None:
        """Writes the global model as one PEFT adapter that carries the whole ledger.

        Args:
            rank: None for the numerical rank of each layer, else the best of that rank.
            client: As of `show`.

        Raises:
            UserError: `path` is in use or cannot be written, or a weight is no finite number.
        """
        adapter = self._adapter(client)
        check_finite(adapter.head)
        cut = as_adapter(self.state.ledger, adapter, self.model.adapted.layers, rank, 0.0)
        whole = AdapterState(uniform(cut.factors), adapter.head)
        with new_directory(Path(path), "the adapter", "save it again") as new:
            self.model.adapted.save_adapter(whole, new, base_name=self.model.name)

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint from which `resume` goes on, bit for bit."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        told = {"history": [r.record for r in self.history], "identity": self._identity()}
        if isinstance(train := self.engine.train_with, PrivateTrainer):
            told["spent"] = train.kept()
        save_checkpoint(folder, self.state, told)

    @classmethod
    def resume(cls, path: str | Path, *given: Any, **options: Any) -> Federation:
        """The federation that was saved, from its newest checkpoint.

        Args:
            given: What it was made of, the same as then; with `options` as for the class.

        Raises:
            UserError: No checkpoint there, or it was made of something else.
        """
        federation = cls(*given, **options)
        there = checkpoints(Path(path))
        if not there:
            raise UserError(f"{path}: there is no checkpoint; expected a folder that `save` wrote")
        state, extra = load_checkpoint(there[0])
        then, now = extra.get("identity", {}), federation._identity()
        if different := sorted(k for k in now if then.get(k) != now[k]):
            key = different[0]
            raise UserError(
                f"{path}: was saved with another {key}: {then.get(key)!r} then, {now[key]!r} now"
            )
        federation.state = state
        if isinstance(train := federation.engine.train_with, PrivateTrainer):
            train.take_up(extra.get("spent", {}))
        federation.history = Rounds(Round(r["round"], r) for r in extra["history"])
        return federation

    def _identity(self) -> dict[str, Any]:
        s, method = self.settings, self.settings.method
        chosen = ("ranks", "rank", "carry", "flush", "weights", "server_learning_rate")
        chosen += ("clients_per_round", "wire_dtype")
        return {
            **{name: _plain(getattr(s, name)) for name in chosen},
            "method": f"{method.trains}, {type(method.assignment).__name__}, {method.residual}",
            "seed": s.seed,
            "clients": dict(s.examples),
            "layers": {n: [x.out, x.inp, x.rank, x.scale] for n, x in s.layers.items()},
        }

    def _adapter(self, client: str | None) -> AdapterState:
        """The factors and head that go with the global base."""
        shared, names = not self.settings.method.personal, ", ".join(self.settings.clients)
        if shared and client is not None:
            raise UserError(f"client: {client!r}, but there is one global model; leave it out")
        if not shared and client not in self.settings.clients:
            raise UserError(f"client: every client has a model of its own; name one of {names}")
        if client is not None:
            return folded(start_of(self.state, self.settings, client))
        return folded(AdapterState(global_factors(self.state, self.settings), self.state.head))


def _plain(value: Any) -> Any:
    """As JSON brings it back."""
    return (
        dict(value)
        if isinstance(value, Mapping)
        else (str(value) if isinstance(value, torch.dtype) else value)
    )


def _way(train: HFTrainer | Callable[..., Trained] | Train | None, model: Model) -> Train:
    train = HFTrainer() if train is None else train
    if model.tokenizer is None and isinstance(train, HFTrainer) and train.collate is None:
        raise UserError(
            "train: a module of one's own has no tokenizer that makes batches; give a function "
            "train(module, rows, *, round, client, rng), or HFTrainer(collate=...)"
        )
    return cast(Train, train) if hasattr(train, "together") else OwnLoop(cast(Any, train))


def _pooled(rows: Mapping[str, Any]) -> Dataset:
    if odd := [name for name, part in rows.items() if not isinstance(part, Dataset)]:
        raise UserError(
            f"clients: the rows of {odd[0]} are a {type(rows[odd[0]]).__name__}; a method that "
            "pools rows expects datasets.Dataset"
        )
    return concatenate_datasets(list(rows.values()))


def _inputs(model: Model, rows: Any, whose: str) -> Any:
    """The columns that the model takes, as transformers.Trainer keeps them; of a module of one's
    own the rows are whatever its train function takes."""
    if not hasattr(rows, "__len__"):
        raise UserError(f"{whose}: expected rows that can be counted, got {type(rows).__name__}")
    if not len(rows):
        raise UserError(f"{whose}: expected rows, got {type(rows).__name__} without any")
    if model.tokenizer is None:
        return rows
    if not hasattr(rows, "select_columns"):
        raise UserError(
            f"{whose}: expected a datasets.Dataset, got {type(rows).__name__}; a list becomes one "
            "by Dataset.from_list"
        )
    base = getattr(model.module, "get_base_model", lambda: model.module)()
    taken = {*inspect.signature(base.forward).parameters, "labels", "label", "label_ids"}
    kept = [name for name in rows.column_names if name in taken]
    if not kept:
        raise UserError(
            f"{whose}: {len(rows)} rows with the columns {', '.join(rows.column_names)}; expected "
            "encoded rows, e.g. input_ids, attention_mask and labels"
        )
    rows = rows.select_columns(kept)
    return rows.rename_column("label", "labels") if "label" in kept else rows
