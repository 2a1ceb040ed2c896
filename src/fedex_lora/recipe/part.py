"""What all blocks of a recipe have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedex_lora.errors import did_you_mean as did_you_mean

Problem = tuple[str, str]  # dotted path within the block, what is wrong there
LocalPath = Annotated[Path, Field(strict=False)]  # YAML has no paths: text is one


class Part(BaseModel):
    """Base of all blocks: unknown keys are errors, values do not change after validation.

    Types are strict: `true` is no number and `3` is no text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """What is wrong with fields that are each fine by themselves."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> Self:
        check(self.problems())
        return self


def check(problems: Iterable[Problem]) -> None:
    """Raises what pydantic reports as an error, with all problems, if there are any."""
    found = list(problems)
    if found:
        raise fault(found)


def fault(found: list[Problem]) -> PydanticCustomError:
    """What pydantic reports as an error, with these problems."""
    text = "; ".join(f"{path}: {what}" for path, what in found)
    return PydanticCustomError("fields", "{text}", {"text": text, "found": found})
