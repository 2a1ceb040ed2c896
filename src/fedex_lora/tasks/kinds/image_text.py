"""Answering questions about an image with a vision-language model: the loss is over the answer.

A row has an image, a question and an answer; or an image and `messages`, before whose first
question the image stands, and whose last answer is learned. Images become pixels batch by batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from fedex_lora.errors import DataError, RecipeError, check_installed, shown
from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks.base import (
    IGNORED,
    Batch,
    Collate,
    LineOf,
    NoneLeft,
    Prediction,
    Task,
    blanked,
    check_columns,
    evaluating,
    one_based,
    pad,
    padding,
    place,
    refuse_first,
    with_columns,
)
from fedex_lora.tasks.chat_templates import template_of
from fedex_lora.tasks.conversations import (
    LISTS,
    Turn,
    Unusable,
    blank,
    content_of,
    conversation,
)
from fedex_lora.tasks.generation import Decoding, batches, matched, settings, text_of
from fedex_lora.tasks.kinds.image_classification import check_images
from fedex_lora.tasks.language import nll
from fedex_lora.tasks.lazy import Dataset, datasets, nn, torch
from fedex_lora.tasks.metrics import LOSS, PERPLEXITY, SHARE, mean_loss, perplexity
from fedex_lora.tasks.outputs import Outputs

MARK = "<image>"  # what LLaVA's data have in a question, where the image goes

_log = logging.getLogger(__name__)


class ImageText(TaskSpec):
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"
    template: str | None = None  # the processor's own; a name, e.g. vicuna; a file of Jinja
    generate: bool = False  # generate answers when evaluating, greedily, and count exact matches
    max_new_tokens: int = Field(default=64, ge=1, le=10**7)

    def build(self, labels: Sequence[str] | None) -> Task:
        check_installed("PIL", "task.kind: image-text")
        template = None if self.template is None else template_of(self.template)
        decoding = Decoding(self.max_new_tokens)
        metrics = {"perplexity": PERPLEXITY, "loss": LOSS}
        metrics = {**({"exact_match": SHARE} if self.generate else {}), **metrics}
        return Task(
            name="image-text",
            auto_model="AutoModelForImageTextToText",
            peft_task_type="CAUSAL_LM",
            columns=(self.image_column,),
            evaluation_splits=("validation", "test"),
            primary=next(iter(metrics)),
            metrics=metrics,
            check=partial(_check, self),
            encode=partial(_encode, self, template),
            collator=partial(_collator, self.image_column),
            evaluate=partial(_evaluate, self.image_column, decoding if self.generate else None),
            image=self.image_column,
            chat_template=template,
            prediction=Prediction(
                blank=partial(_blank, self), tell=partial(_tell, self.image_column, decoding)
            ),
        )


register_task("image-text", ImageText)


def _columns(spec: ImageText, rows: Dataset) -> dict[str, str]:
    """Where texts stand, and the keys that say so."""
    there = next((name for name in LISTS if name in rows.column_names), None)
    if there:
        return {there: f"columns.{there}"}
    return {spec.question_column: "question_column", spec.answer_column: "answer_column"}


def _check(spec: ImageText, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    columns = {spec.image_column: "image_column", **_columns(spec, rows)}
    check_columns(rows, list(columns), where, list(columns.values()))
    check_images(rows, spec.image_column, where, line_of)
    refuse_first((_problem(spec, row) for row in _records(spec, rows)), where, line_of)


def _records(spec: ImageText, rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows without their images."""
    names = list(_columns(spec, rows))
    return (dict(zip(names, values)) for values in zip(*(rows[name] for name in names)))


def _problem(spec: ImageText, row: Mapping[str, Any]) -> str | None:
    try:
        _turns(spec, row)
    except Unusable as problem:
        return str(problem)
    return None


def _turns(spec: ImageText, row: Mapping[str, Any]) -> list[Turn]:
    """A row's turns, which end with the answer."""
    form = next((name for name in LISTS if name in row), None)
    if form is None:
        asked, answered = (row[name] for name in (spec.question_column, spec.answer_column))
        return [
            {"role": "user", "content": content_of(_unmarked(asked), spec.question_column)},
            {"role": "assistant", "content": content_of(answered, spec.answer_column)},
        ]
    turns = conversation({form: _without_image(row[form])}, form).turns
    if next(turn["role"] for turn in turns if turn["role"] != "system") != "user":
        raise Unusable("the assistant speaks first; expected a question about the image.")
    return turns


def _without_image(messages: Any) -> Any:
    """The messages without what stands for the image, which is put before the first question."""
    try:
        found = json.loads(messages) if isinstance(messages, str) else messages
    except ValueError:
        return messages
    if not isinstance(found, list):
        return messages
    count = 0
    for message in (m for m in found if isinstance(m, dict)):
        for key in ("content", "value"):
            if isinstance(message.get(key), list):
                kept = [part for part in message[key] if not _is_image(part)]
                count += len(message[key]) - len(kept)
                message[key] = kept
            elif isinstance(message.get(key), str):
                count += message[key].count(MARK)
                message[key] = _unmarked(message[key])
    if count > 1:
        raise Unusable(f"{count} images in a conversation; a row has one.")
    return found


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and str(part.get("type")).startswith("image")


def _unmarked(text: Any) -> Any:
    return text.replace(MARK, "").strip() if isinstance(text, str) and MARK in text else text


def _blank(spec: ImageText, rows: Dataset, where: str) -> Dataset:
    """The rows with some answer at the end of each, in place of what stands there."""
    if any(name in rows.column_names for name in LISTS):
        check_columns(rows, [spec.image_column], where, ["image_column"])
        return blank(rows, where)
    columns = {spec.image_column: "image_column", spec.question_column: "question_column"}
    return blanked(rows, where, list(columns), {spec.answer_column: "-"}, list(columns.values()))


def _encode(
    spec: ImageText, template: str | None, rows: Dataset, tokenizer: Any, max_length: int
) -> Dataset:
    """The images with a prompt, as text, and its answer, as text and (`labels`) as tokens."""
    _check_processor(tokenizer, template)
    images = rows.select_columns([spec.image_column])
    images = images.cast_column(spec.image_column, datasets.Image(mode="RGB"))
    found, taken = [], {}
    for i, row in enumerate(_records(spec, rows)):
        *asked, answer = _turns(spec, row)
        prompt, response = _prompt(tokenizer, template, asked, i), answer["content"]
        inner = tokenizer.tokenizer
        ids = [*inner(response, add_special_tokens=False)["input_ids"], inner.eos_token_id]
        asks, image = len(inner(prompt, verbose=False)["input_ids"]), images[i][spec.image_column]
        if image.size not in taken:
            whole = tokenizer(text=[prompt], images=[[image]])["input_ids"][0]
            taken[image.size] = len(whole) - asks
        if taken[image.size] + asks + len(ids) <= max_length:
            found.append({"at": i, "prompt": prompt, "response": response, "labels": ids})
    reason = f"image and texts together are longer than max_length ({max_length} tokens)"
    if not found:
        least = f"an image alone takes {min(taken.values())} or more"
        raise NoneLeft(f"none of the {len(rows)} rows can be used: in each {reason}; {least}.")
    if len(found) < len(rows):
        _log.warning("%d of %d rows left out: their %s", len(rows) - len(found), len(rows), reason)
    images = images.select([one["at"] for one in found])
    names = ("prompt", "response", "labels")
    return with_columns(images, {name: [one[name] for one in found] for name in names})


def _check_processor(processor: Any, template: str | None) -> None:
    name = type(processor).__name__
    if template is None and not processor.chat_template:
        raise RecipeError(
            f"task.template: missing; the model's processor ({name}) has no chat template. Name "
            "one, e.g. vicuna, or a file with one"
        )
    if name.startswith("PaliGemma"):  # its prompts see both ways, and so would its answers
        raise RecipeError(
            "model.name: PaliGemma's attention goes both ways within a prompt, which is not done "
            "here; take a model of another kind, e.g. LLaVA or Idefics3"
        )


def _prompt(processor: Any, template: str | None, asked: Sequence[Turn], row: int) -> str:
    """What stands before the answer, the image at the beginning of the first question."""
    first = next(i for i, turn in enumerate(asked) if turn["role"] == "user")
    mark = str(getattr(processor, "image_token", MARK))
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(asked):
        text = turn["content"]
        if mark in text:
            said = f"{place(row)}: {shown(text)} has {mark} in it"
            raise DataError(f"{said}, which stands for the image; write it otherwise")
        if template is None:  # of a processor: in parts
            parts = [{"type": "image"}] if i == first else []
            messages.append({**turn, "content": [*parts, {"type": "text", "text": text}]})
        else:
            messages.append({**turn, "content": f"{mark}\n{text}" if i == first else text})
    return processor.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def _collator(column: str, tokenizer: Any) -> Collate:
    return partial(_labelled, column, tokenizer)


def _labelled(column: str, processor: Any, rows: list[dict[str, Any]]) -> Batch:
    return _batch(column, rows, processor)


def _batch(
    column: str, rows: Sequence[Mapping[str, Any]], processor: Any, asked: bool = False
) -> Batch:
    """What the processor makes of images and prompts, with the answers and `labels`; `asked`: up
    to where the answers begin."""
    texts, images = [row["prompt"] for row in rows], [[row[column]] for row in rows]
    found = processor(text=texts, images=images, padding=True, return_tensors="pt")
    there = found["attention_mask"].bool()
    by_token = [key for key, value in found.items() if value.shape == there.shape]
    each = [{key: found[key][i][there[i]].tolist() for key in by_token} for i in range(len(rows))]
    for one, row in zip(each, rows, strict=True):
        if one["input_ids"][:2] == [processor.tokenizer.bos_token_id] * 2:  # the template's, too
            for key in by_token:
                one[key] = one[key][1:]
        answer = [] if asked else list(row["labels"])
        one["labels"] = [IGNORED] * len(one["input_ids"]) + answer
        more = {"input_ids": answer, "attention_mask": [1] * len(answer)}
        for key in by_token:
            one[key] = one[key] + more.get(key, [0] * len(answer))
    side = "left" if asked else "right"
    fill = {"input_ids": padding(processor.tokenizer), "labels": IGNORED}
    names = [key for key in (*by_token, "labels") if not (asked and key == "labels")]
    return {
        **{key: value for key, value in found.items() if key not in by_token},
        **{key: pad(each, key, fill.get(key, 0), side) for key in names},
    }


def _evaluate(
    column: str,
    decoding: Decoding | None,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: Any,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """`loss`, the mean of −log p over the tokens of all answers, and exact matches if asked for."""
    sums: list[float] = []
    counts: list[int] = []
    with evaluating(model) as device:
        for start in range(0, len(encoded), batch_size):
            rows = [encoded[i] for i in range(start, min(start + batch_size, len(encoded)))]
            batch = _batch(column, rows, tokenizer)
            labels = batch.pop("labels").to(device)
            logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
            found = nll(logits, labels)
            sums, counts = sums + found[0], counts + found[1]
    loss = mean_loss(sums, counts)
    scores = {"perplexity": perplexity(loss), "loss": loss}
    if decoding is None:
        return scores
    prompts, texts = _generated(column, decoding, model, encoded, tokenizer, batch_size, outputs)
    references = encoded["response"][:]
    return {
        "exact_match": matched(tokenizer.tokenizer, prompts, texts, references, outputs),
        **scores,
    }


def _generated(
    column: str,
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    processor: Any,
    batch_size: int,
    outputs: Outputs | None = None,
) -> tuple[list[list[int]], list[str]]:
    """The prompts without their images, and the texts that follow."""
    inner: Any = processor.tokenizer
    prompts = inner(encoded["prompt"][:], verbose=False)["input_ids"]

    def generated(rows: Sequence[int], device: torch.device) -> list[str]:
        batch = _batch(column, [encoded[i] for i in rows], processor, asked=True)
        inputs = {key: value.to(device) for key, value in batch.items()}
        told = model.generate(**inputs, generation_config=settings(decoding, inner))  # type: ignore[operator]
        return [text_of(ids, inner) for ids in told[:, batch["input_ids"].shape[1] :].tolist()]

    return prompts, batches(generated, model, prompts, decoding, batch_size, outputs)


def _tell(
    column: str,
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    decoding = decoding.of_at_most(max_new_tokens)
    _, texts = _generated(column, decoding, model, encoded, tokenizer, batch_size)
    return [{"prediction": text} for text in texts]
