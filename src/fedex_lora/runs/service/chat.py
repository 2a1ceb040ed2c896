"""Talking to a language model: a run's, an adapter's, or any."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import RecipeError
from fedex_lora.recipe import Recipe
from fedex_lora.runs.evaluation import Subject
from fedex_lora.tasks.generation import Decoding, generate


class Chat:
    """A conversation with a causal language model.

    What is said goes through the tokenizer's chat template, with all that was said before; of a
    model without one through the prompt of a task of kind instruction, or as it is, and then every
    prompt stands by itself.

    Args:
        subject: The model.
        recipe: Its block `task` is asked for a prompt's template.
        system: What the conversation begins with; for models with a chat template.
        max_new_tokens: Of an answer.

    Raises:
        UserError: It is no language model, or knows no system prompt.
    """

    def __init__(
        self, subject: Subject, recipe: Recipe, system: str | None = None, max_new_tokens: int = 256
    ) -> None:
        self.model, self.tokenizer = subject.model.module, subject.model.tokenizer
        if not hasattr(self.model, "generate") or not self.model.can_generate():
            raise RecipeError(
                f"{subject.name}: a model that tells classes or numbers; use `fedex-lora predict`"
            )
        self.decoding, self.system = Decoding(max_new_tokens), system
        self.prompt = getattr(recipe.task, "prompt", None)
        own = getattr(self.tokenizer, "chat_template", None)
        self.template = recipe_task(recipe).chat_template or own
        if system is not None and self.template is None:
            raise RecipeError("`system`: this model has no chat template; leave it out")
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        begin = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.turns: list[dict[str, str]] = begin

    def say(self, text: str) -> str:
        """The answer, by greedy decoding."""
        if self.template is None:
            return self._generate(self.tokenizer(self._asked(text))["input_ids"])
        self.turns.append({"role": "user", "content": text})
        answer = self._generate(
            self.tokenizer.apply_chat_template(
                self.turns,
                chat_template=self.template,
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _asked(self, text: str) -> str:
        """The prompt of a task that has one field for it."""
        if self.prompt is None:
            return text
        names = {name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None}
        return self.prompt.format(**dict.fromkeys(names, text)) if len(names) == 1 else text

    def _generate(self, ids: Sequence[int]) -> str:
        return generate(self.model, self.tokenizer, [ids], self.decoding, 1)[0].strip()
