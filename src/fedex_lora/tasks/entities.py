"""Entities in texts: words with BIO tags or spans of characters, and how they lie on tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedex_lora.errors import shown
from fedex_lora.tasks.base import IGNORED

Span = tuple[int, int]
OUTSIDE = "O"


class Unusable(ValueError):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Entity:
    """Characters `start` to `end` of a text, of class `kind`."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Annotated:
    """A text and its entities in order; `words` are the parts that are told, None for all."""

    text: str
    entities: list[Entity]
    words: list[Span] | None = None


def tags_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """The classes of tokens, in the order of CoNLL's numbers.

    Example:
        >>> tags_of(["PER", "LOC"])
        ('O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC')
    """
    return (OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))


def of_words(words: Any, tags: Any, known: Sequence[str]) -> Annotated:
    """A row of words with a BIO tag each, as a text with single spaces.

    An I- that continues nothing begins an entity, as seqeval reads it (and IOB1 writes it).

    Args:
        known: The tags, by number.

    Raises:
        Unusable: It is no such row.

    Example:
        >>> of_words(["In", "New", "York"], ["O", "B-LOC", "I-LOC"], tags_of(["LOC"])).entities
        [Entity(start=3, end=11, kind='LOC')]
    """
    for name, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list):
            raise Unusable(f"the list of {name} is {shown(value)}, which is none.")
    if len(words) != len(tags):
        raise Unusable(f"{len(words)} tokens, but {len(tags)} tags; expected one for each.")
    entities: list[Entity] = []
    places: list[Span] = []
    at, last = 0, OUTSIDE
    for i, (word, given) in enumerate(zip(words, tags), start=1):
        if not isinstance(word, str) or not word.strip():
            raise Unusable(f"token {i} is {shown(word)}; expected a text that is not empty.")
        tag = known[given] if isinstance(given, int) and 0 <= given < len(known) else given
        if not isinstance(tag, str) or tag not in known:
            raise Unusable(f"tag {i} is {shown(given)}; expected one of {', '.join(known)}.")
        places.append((at, at + len(word)))
        mark, _, kind = tag.partition("-")
        if mark == "I" and last[1:] == tag[1:]:
            entities[-1] = Entity(entities[-1].start, at + len(word), kind)
        elif mark != OUTSIDE:
            entities.append(Entity(at, at + len(word), kind))
        at, last = at + len(word) + 1, tag
    if not places:
        raise Unusable("there are no tokens.")
    return Annotated(" ".join(words), entities, places)


def of_spans(text: Any, spans: Any, kinds: Sequence[str]) -> Annotated:
    """A row of a text and a list of entities with `start`, `end` (of characters, the end not
    included) and `label`.

    Raises:
        Unusable: It is no such row.
    """
    if not isinstance(text, str) or not text.strip():
        found = "missing" if text is None else f"{shown(text)}; expected a text that is not empty"
        raise Unusable(f"the text is {found}.")
    if spans is not None and not isinstance(spans, list):
        raise Unusable(f"the list of entities is {shown(spans)}, which is none.")
    entities = sorted((_entity(text, span, kinds) for span in spans or []), key=lambda e: e.start)
    for one, other in pairwise(entities):
        if other.start < one.end:
            raise Unusable(f"entities at {one.start} and {other.start} overlap.")
    return Annotated(text, entities)


def _entity(text: str, span: Any, kinds: Sequence[str]) -> Entity:
    if not isinstance(span, Mapping):
        raise Unusable(f"an entity is {shown(span)}; expected start, end and label.")
    start, end, kind = span.get("start"), span.get("end"), span.get("label")
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, end))
    if not whole or not 0 <= start < end <= len(text):  # type: ignore[operator]
        raise Unusable(
            f"an entity from {shown(start)} to {shown(end)}; the text has {len(text)} characters."
        )
    if kind not in kinds:
        raise Unusable(f"an entity's label is {shown(kind)}; expected one of {', '.join(kinds)}.")
    return Entity(start, end, str(kind))  # type: ignore[arg-type]


def on_tokens(
    row: Annotated, offsets: Sequence[Span], tags: Sequence[str]
) -> tuple[list[int], list[Entity]]:
    """The tags' numbers, one for each token, and the entities that begin or end within a token.

    A token that an entity has a part of is the entity's, the first one's where there are two. Of a
    word the first token is told, the others are passed over; so are tokens without characters.

    Args:
        offsets: Of the tokens, in characters.
    """
    number = {tag: i for i, tag in enumerate(tags)}
    trimmed = [_trimmed(row.text, offset) for offset in offsets]
    told = [start < end for start, end in trimmed]
    if row.words is not None:
        told = _first_of_words(trimmed, row.words)
    found, crossing, begun = [], [], set[int]()
    for (start, end), asked in zip(trimmed, told):
        hit = [
            i for i, e in enumerate(row.entities) if start < end and e.start < end > start < e.end
        ]
        if not asked:
            found.append(IGNORED)
        elif not hit:
            found.append(number[OUTSIDE])
        else:
            first = hit[0]
            mark = "I" if first in begun else "B"
            found.append(number[f"{mark}-{row.entities[first].kind}"])
            begun.add(first)
        crossing += [
            row.entities[i]
            for i in hit
            if start < row.entities[i].start or row.entities[i].end < end
        ]
    return found, list(dict.fromkeys(crossing))


def told(
    text: str, offsets: Sequence[Span], tags: Sequence[str], probabilities: Sequence[float]
) -> list[dict[str, Any]]:
    """The entities that the tags of a text's tokens tell, each with its mean probability.

    Example:
        >>> told("In New York", [(0, 2), (2, 6), (6, 11)], ["O", "B-LOC", "I-LOC"], [1, 0.5, 1])
        [{'start': 3, 'end': 11, 'label': 'LOC', 'text': 'New York', 'probability': 0.75}]
    """
    found: list[tuple[str, list[Span], list[float]]] = []
    last = OUTSIDE
    for offset, tag, probability in zip(offsets, tags, probabilities, strict=True):
        mark, _, kind = tag.partition("-")
        if mark == "I" and last[1:] == tag[1:]:
            found[-1][1].append(offset)
            found[-1][2].append(probability)
        elif mark != OUTSIDE:
            found.append((kind, [_trimmed(text, offset)], [probability]))
        last = tag
    return [
        {
            "start": spans[0][0],
            "end": spans[-1][1],
            "label": kind,
            "text": text[spans[0][0] : spans[-1][1]],
            "probability": sum(p) / len(p),
        }
        for kind, spans, p in found
    ]


def _trimmed(text: str, offset: Span) -> Span:
    """Without the blanks that byte-level tokenizers count to the token after them."""
    start, end = offset
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _first_of_words(tokens: Sequence[Span], words: Sequence[Span]) -> list[bool]:
    told, at = [], iter([*words, (10**9, 10**9)])
    word = next(at)
    for start, end in tokens:
        first = start < end and end > word[0]
        told.append(first)
        while first and end > word[0]:
            word = next(at)
    return told


def sequences(tags: Sequence[str], labels: Sequence[Sequence[int]]) -> Iterator[list[str]]:
    """Numbers as tags, without tokens that are passed over."""
    for row in labels:
        yield [tags[label] for label in row if label != IGNORED]
