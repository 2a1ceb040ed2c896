"""Greedy and beam search in which a text leaves the batch as soon as it has ended.

The tokens are those of transformers' own searches, which put a batch through the model until its
last text has ended, and a prompt as many times as it has beams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedex_lora.tasks.lazy import Tensor, functional, torch

if TYPE_CHECKING:  # what transformers' `generate` takes as `custom_generate`
    Search = Callable[..., Tensor]  # rows × tokens: the prompt, the text, its end and any padding


class Live:
    """The sequences that go on, and what the model keeps of them.

    Attributes:
        ids: Sequences × tokens so far, prompts (padded on the left) included.
    """

    def __init__(self, model: Any, ids: Tensor, config: Any, kept: dict[str, Any]) -> None:
        self.ids = ids
        self._model, self._config, self._kept = model, config, kept
        self._begun = False

    def logits(self) -> Tensor:
        """Of each sequence's next token (sequences × vocabulary, float32)."""
        model, kept = self._model, self._kept
        if self._begun:
            inputs = model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **kept)
            output = model(**inputs, return_dict=True)
        else:
            output = model._prefill(self.ids, self._config, kept)
        self._begun = True
        self._kept = model._update_model_kwargs_for_generation(
            output, kept, is_encoder_decoder=model.config.is_encoder_decoder
        )
        return output.logits[:, -1].float()

    def go_on(self, rows: Tensor, tokens: Tensor) -> None:
        """These sequences go on, each with a token; one may do so several times, others end."""
        if not torch.equal(rows, torch.arange(len(self.ids), device=rows.device)):
            self.ids = self.ids[rows]
            self._kept = {key: _chosen(key, value, rows) for key, value in self._kept.items()}
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)


def _chosen(key: str, value: Any, rows: Tensor) -> Any:
    if hasattr(value, "reorder_cache"):
        value.reorder_cache(rows)
        return value
    if isinstance(value, tuple | list):  # the cache of an older model, or of RWKV
        return type(value)(_chosen(key, part, rows) for part in value)
    if key == "encoder_outputs":
        return type(value)(**{name: part[rows] for name, part in value.items()})
    if isinstance(value, torch.Tensor):  # positions may have a dimension of their own before
        return value.index_select(-2 if key.endswith("position_ids") else 0, rows)
    return value


def greedy(max_new_tokens: int, end: int | None) -> Search:
    """The likeliest token, one after the other.

    Args:
        end: The token that ends a text, and is its last.
    """

    def search(
        model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **kept: Any
    ) -> Tensor:
        live = Live(model, input_ids, generation_config, inputs(kept))
        start, found = input_ids.shape[1], [[] for _ in input_ids]
        owners = torch.arange(len(input_ids), device=input_ids.device)
        for step in range(1, max_new_tokens + 1):
            tokens = logits_processor(live.ids, live.logits()).argmax(dim=-1)
            ended = _ends(tokens, end) | (step == max_new_tokens)
            for row in ended.nonzero()[:, 0].tolist():
                found[int(owners[row])] = [*live.ids[row, start:].tolist(), int(tokens[row])]
            (rows,) = (~ended).nonzero(as_tuple=True)
            if not len(rows):
                break
            live.go_on(rows, tokens[rows])
            owners = owners[rows]
        return _told(input_ids, found)

    return search


def beams(max_new_tokens: int, end: int | None, width: int, length_penalty: float) -> Search:
    """The text with the largest log p / length^length_penalty of those that a beam search finds.

    A prompt's search ends when its likeliest open text would not, as it is, be among its `width`
    best ended ones (`early_stopping=False` of transformers).

    Args:
        width: How many texts of a prompt go on at a time.
    """

    def search(
        model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **kept: Any
    ) -> Tensor:
        live = Live(model, input_ids, generation_config, inputs(kept))
        start, device = input_ids.shape[1], input_ids.device
        best: list[list[tuple[float, list[int]]]] = [[] for _ in input_ids]  # ended, best first
        owners = list(range(len(input_ids)))
        scores = torch.zeros(len(input_ids), 1, device=device)  # log p: prompts × open texts
        for step in range(1, max_new_tokens + 1):
            found = functional.log_softmax(live.logits(), dim=-1)
            found = logits_processor(live.ids, found)
            vocabulary = found.shape[-1]
            found = (found.view(*scores.shape, -1) + scores[..., None]).flatten(1)
            # each open text has one way to end, so half of these go on at least
            top, places = found.topk(min(2 * width, found.shape[1]))
            tokens = places % vocabulary
            rows = places // vocabulary + scores.shape[1] * torch.arange(
                len(top), device=device
            ).unsqueeze(1)
            ended = _ends(tokens, end) | (step == max_new_tokens)
            worth = top / step**length_penalty
            for i, place in ended[:, :width].nonzero().tolist():
                text = [*live.ids[rows[i, place], start:].tolist(), int(tokens[i, place])]
                best[owners[i]].append((worth[i, place].item(), text))
            for i in owners:
                best[i] = sorted(best[i], key=lambda scored: -scored[0])[:width]
            if step == max_new_tokens:
                break
            going = ended.long().argsort(dim=1, stable=True)[:, :width]
            scores, rows, tokens = (values.gather(1, going) for values in (top, rows, tokens))
            hoped = (scores[:, 0] / step**length_penalty).tolist()
            left = [
                i
                for i, owner in enumerate(owners)
                if len(best[owner]) < width or hoped[i] > best[owner][-1][0]
            ]
            if not left:
                break
            scores, owners = scores[left], [owners[i] for i in left]
            live.go_on(rows[left].flatten(), tokens[left].flatten())
        return _told(input_ids, [ended[0][1] for ended in best])

    return search


def _told(prompts: Tensor, texts: list[list[int]]) -> Tensor:
    """What follows a text's end is anything."""
    longest = max(map(len, texts))
    filled = [[*ids, *ids[-1:] * (longest - len(ids))] for ids in texts]
    return torch.cat([prompts, torch.tensor(filled, device=prompts.device)], dim=1)


def _ends(tokens: Tensor, end: int | None) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool) if end is None else tokens == end


def inputs(kept: dict[str, Any]) -> dict[str, Any]:
    """What transformers gives a search besides, without what is for searches of its own."""
    return {key: value for key, value in kept.items() if key not in _THEIRS}


_THEIRS = ("stopping_criteria", "synced_gpus", "streamer")
