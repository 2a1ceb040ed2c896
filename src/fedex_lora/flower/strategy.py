"""FedEx-LoRA as a strategy for Flower apps that exchange PEFT adapters.

The arrays are those of FedAvg: B̄ and Ā under PEFT's names, and the mean of the head. What the
means miss, s·(Σ wᵢBᵢAᵢ − B̄Ā), is added up in T, the change of the base since the pretrained
weights. Flower's clients keep nothing between rounds, so every message brings T whole, at its
numerical rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.serverapp.strategy.strategy_utils import validate_message_reply_consistency
from peft import LoraConfig
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.aggregator import Aggregate, Aggregator
from fedex_lora.aggregation.delta import Delta, concat
from fedex_lora.aggregation.methods import get_method
from fedex_lora.errors import UpdateRefused, UserError, some
from fedex_lora.flower import arrays as wire
from fedex_lora.flower.growing import grown
from fedex_lora.flower.reply import check_like, read_reply
from fedex_lora.model.plain import configured, unsupported

SERVED = ("fedex", "fedex-svd", "fedit", "ffa")
FEW = 3  # clients whose factors a round's result gives away, of 3 up to an r × r matrix a layer
Base = Mapping[str, Delta]


class FedExLora(FedAvg):
    """FedAvg for LoRA adapters whose global model is exactly the clients' weighted mean.

    A client's update is `get_peft_model_state_dict(model)` and its "num-examples" nᵢ. With
    wᵢ = nᵢ / Σn the next global model is

        W0 + T + s·B̄Ā,    B̄ = Σ wᵢBᵢ,  Ā = Σ wᵢAᵢ,    T ← T + s·(Σ wᵢBᵢAᵢ − B̄Ā).

    Clients load it by `fedex_lora.flower.load_global(model, message.content)`, in place of PEFT's
    `set_peft_model_state_dict`. A client that does not has the means without T, as under FedAvg.

    What `evaluate_fn` gets and `Result.arrays` holds are the adapter and T as named arrays
    (`load_global` and `save_global` take them; a run may begin from them). Under a wrapping
    strategy those are the adapter alone: `whole` adds T.

    A reply that cannot be aggregated is refused by name, and the round goes on with the others, if
    those are at least `min_train_nodes`.

    A wrapper that changes the averages before they are sent, as Flower's differential privacy does
    by noise, would not change T. So nothing of the round's residual is sent then, and a warning
    says so; "ffa", whose residual is zero, loses nothing by it.

    Args:
        lora_config: The adapter's: α, r, rsLoRA and the patterns, from which the scales s follow.
            A LoraConfig or what its JSON file holds.
        method: "fedex"; "fedex-svd": the residual cut to `rank`; "fedit": no residual; "ffa": B
            alone is trained.
        rank: r' of "fedex-svd".
        carry: Whether what that cuts off is added to the next residual; the last round of `start`
            sends all of it.
        fedavg: All that FedAvg takes, e.g. `fraction_train`, `weighted_by_key`.

    Raises:
        UserError: The configuration is no plain LoRA, or a method that is not served here.

    Source:
        Singhal, Ponkshe, Vepakomma, "FedEx-LoRA", arXiv 2410.09432, eq. 5-18.
    """

    def __init__(
        self,
        lora_config: LoraConfig | Mapping[str, Any],
        method: str = "fedex",
        *,
        rank: int | None = None,
        carry: bool = True,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self._config = _plain(lora_config)
        self.method = get_method(method)
        if method not in SERVED:
            raise UserError(
                f"method: {method!r} needs clients that keep something between rounds, and those "
                f"of a Flower app do not; expected one of {', '.join(SERVED)}"
            )
        self._truncated = method == "fedex-svd"
        if self._truncated != (rank is not None) or (rank is not None and rank < 1):
            wanted = "a whole number from 1" if self._truncated else "none, it is of fedex-svd"
            raise UserError(f"rank: {rank} with method {method!r}; expected {wanted}")
        self._rank, self._carries = rank, carry
        self._last_round: int | None = None
        self._sent: dict[str, Tensor] = {}  # the averages, as they were given out last
        self._layers: dict[str, LayerShape] = {}
        self._base: Base = {}  # T, as clients have it
        self._carry: Base = {}
        self._next: tuple[Base, Base] | None = None  # both, until the averages come back

    def summary(self) -> None:
        """Logs the strategy's settings."""
        cut = f", residual of rank {self._rank}" if self._truncated else ""
        log(INFO, "\t├──> Method: %s%s", self.method.source, cut)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As `Strategy.start`; `evaluate_fn` and the result get the adapter and T.

        Args:
            initial_arrays: `ArrayRecord(get_peft_model_state_dict(model))`, or the result's arrays
                of an earlier run, which go on from there.
        """

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            assert evaluate_fn is not None
            return evaluate_fn(server_round, self.whole(arrays) if server_round else arrays)

        self._last_round = num_rounds
        result = super().start(
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate if evaluate_fn else None,
        )
        if result.arrays:
            result.arrays = self.whole(result.arrays)
        return result

    def whole(self, arrays: ArrayRecord) -> ArrayRecord:
        """The newest averages as clients get them, and T beside them, as named arrays.

        Args:
            arrays: What the last round gave, after whatever a wrapper did to it.
        """
        self._settle(arrays)
        return _record({**self._sent, **wire.named(self._base)})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; the ConfigRecord brings T."""
        if server_round == 1 or not self._sent:
            self._begin(arrays)
        else:
            self._settle(arrays)
        return self._with_base(super().configure_train(server_round, *self._message(config), grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; the ConfigRecord brings T."""
        self._settle(arrays)
        messages = super().configure_evaluate(server_round, *self._message(config), grid)
        return self._with_base(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The averages; their residual waits until they come back to be sent.

        Raises:
            UserError: Replies were refused, and fewer than `min_train_nodes` are left.
        """
        valid, _ = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        if not valid:
            return None, None
        taken, states = self._accepted(valid)
        if server_round == 1 and self.method.in_ledger and len(states) <= FEW:
            log(
                WARNING,
                "With %d clients a round, from averages and residual a client can work out the "
                "others' factors, or come near; more clients hide them better.",
                len(states),
            )
        trained = self.method.trained(server_round)
        aggregator = Aggregator(self.method, self._layers, trained, clients=len(states))
        for weight, end in states:
            aggregator.add(weight, self._state(self._sent), end)
        result = aggregator.finish()
        self._next = self._grown(result, last=server_round == self._last_round)
        self._report(result)
        self._sent = self._named(result)
        contents = [message.content for message in taken]
        validate_message_reply_consistency(contents, self.weighted_by_key, check_arrayrecord=False)
        return _record(self._sent), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As FedAvg, of the clients that have rows to evaluate on; None where nobody has any, for
        which FedAvg would divide by zero and end the run."""
        found = [m for m in replies if m.has_error() or not self._is_of_no_rows(m)]
        return super().aggregate_evaluate(server_round, found)

    def _is_of_no_rows(self, message: Message) -> bool:
        records = message.content.metric_records.values()
        return [record.get(self.weighted_by_key) for record in records] == [0]

    def _begin(self, arrays: ArrayRecord) -> None:
        """Learns the layers from the initial arrays, which may have a T already."""
        tensors, base = wire.split(wire.tensors_of(arrays))
        self._base = {name: delta.wire_form() for name, delta in base.items()}
        self._carry, self._next = {}, None
        self._layers = {}
        for layer, names in wire.layers_of(tensors).items():
            a, b = tensors[names["A"]], tensors[names["B"]]
            rank, scale = configured(self._config, layer, a.shape[0])
            if a.shape[0] != rank or b.shape[1] != rank:
                raise UserError(
                    f"{layer}: the initial arrays have A {tuple(a.shape)} and B {tuple(b.shape)}; "
                    f"lora_config gives it rank {rank}, so A is ({rank}, in) and B (out, {rank})"
                )
            self._layers[layer] = LayerShape(b.shape[0], a.shape[1], rank, scale)
        self._sent = tensors

    def _settle(self, arrays: ArrayRecord) -> None:
        """Takes up the averages as they come back, with their residual if they are unchanged."""
        if not self._sent:
            return self._begin(arrays)
        tensors, _ = wire.split(wire.tensors_of(arrays))
        check_like(tensors, self._sent)
        same = all(torch.equal(tensors[name], old) for name, old in self._sent.items())
        if self._next and same:
            self._base, self._carry = self._next
        elif self._next and self._next[0]:
            log(
                WARNING,
                "The averages were changed before they were sent, as differential privacy on the "
                "server does. The residual did not get that noise and is left out: this round's "
                "global model is that of fedit. Method ffa has no residual; noise at the clients "
                "(LocalDpMod) covers it.",
            )
        self._next = None
        self._sent = tensors if "A" in self.method.trained(1) else self._with_sent_a(tensors)

    def _with_sent_a(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        frozen = {names["A"] for names in wire.layers_of(self._sent).values()}
        return {n: self._sent[n] if n in frozen else t for n, t in tensors.items()}

    def _message(self, config: ConfigRecord) -> tuple[ArrayRecord, ConfigRecord]:
        about = {
            wire.TRAINS: "".join(sorted(self.method.trained(1))),
            wire.SCALES: [self._layers[name].scale for name in sorted(self._layers)],
            wire.RESIDUAL: b"" if self._is_large() else wire.packed(self._base),
        }
        return _record(self._sent), ConfigRecord({**config, **about})

    def _is_large(self) -> bool:
        return sum(4 * delta.numbers for delta in self._base.values()) > wire.MOST

    def _with_base(self, messages: Iterable[Message]) -> list[Message]:
        """The messages, with a T that no ConfigRecord can hold as an ArrayRecord of its own."""
        sent = list(messages)
        if self._is_large():
            record = _record(wire.named(self._base))
            for message in sent:
                message.content[wire.RESIDUAL] = record
        return sent

    def _accepted(
        self, valid: list[Message]
    ) -> tuple[list[Message], list[tuple[float, AdapterState]]]:
        """The replies that can be aggregated, in the order of their nodes."""
        taken, states, refused = [], [], []
        for message in sorted(valid, key=lambda message: message.metadata.src_node_id):
            try:
                states.append(self._read(message))
                taken.append(message)
            except UpdateRefused as error:
                refused.append(f"node {message.metadata.src_node_id}: {error}")
                log(WARNING, "aggregate_train: refused the reply of %s", refused[-1])
        if refused and len(taken) < max(1, self.min_train_nodes):
            raise UserError(
                f"{len(taken)} replies can be aggregated, min_train_nodes is "
                f"{self.min_train_nodes}; refused: {some(refused, 3)}"
            )
        return taken, states

    def _read(self, message: Message) -> tuple[float, AdapterState]:
        weight, tensors = read_reply(message.content, self._sent, self.weighted_by_key)
        if "A" not in self.method.trained(1):  # noise, or a client that did not freeze it
            tensors = self._with_sent_a(tensors)
        return weight, self._state(tensors)

    def _state(self, tensors: Mapping[str, Tensor]) -> AdapterState:
        return wire.state_of(tensors, {name: layer.scale for name, layer in self._layers.items()})

    def _named(self, result: Aggregate) -> dict[str, Tensor]:
        """The averages by PEFT's names, in the order of the initial arrays."""
        values = dict(result.head)
        for layer, names in wire.layers_of(self._sent).items():
            f: Factors = result.factors[layer]
            values |= {names["A"]: f.A, names["B"]: f.B}
        return {name: values[name] for name in self._sent}

    def _grown(self, result: Aggregate, last: bool) -> tuple[Base, Base]:
        """T with the round's residual, and what truncation keeps for the next."""
        base, carry = dict(self._base), {}
        for layer in sorted({*result.increment, *self._carry}):
            parts = [part[layer] for part in (result.increment, self._carry) if layer in part]
            new = concat(parts) if parts[1:] else parts[0]
            if self._truncated and not (last and self._carries):
                new, cut = new.split(self._rank or 0)
                if self._carries and cut.rank:
                    carry[layer] = cut
            base[layer] = grown(base.get(layer), new)
            if not base[layer].rank:  # nothing, so far
                del base[layer]
        return base, carry

    def _report(self, result: Aggregate) -> None:
        base = self._next[0] if self._next else {}
        size = sum(4 * delta.numbers for delta in base.values()) / 2**20
        missed = math.hypot(*result.deviation.values()) / (math.hypot(*result.ideal.values()) or 1)
        log(
            INFO,
            "aggregate_train: plain averaging would miss %.3g of the clients' mean change; the "
            "base's change is now %.2f MB a message",
            missed,
            size,
        )


def _plain(lora_config: LoraConfig | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(lora_config, LoraConfig | Mapping):
        raise UserError(
            f"lora_config: got {type(lora_config).__name__}; expected peft's LoraConfig, e.g. "
            'model.peft_config["default"]'
        )
    config = dict(lora_config) if isinstance(lora_config, Mapping) else lora_config.to_dict()
    config.setdefault("peft_type", "LORA")
    if odd := unsupported(config):
        raise UserError(f"lora_config: {odd}; only plain LoRA is aggregated exactly")
    return config


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: tensor.contiguous() for name, tensor in tensors.items()})
