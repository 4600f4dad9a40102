"""What an engine tells besides answers: the likelihood of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from qvl_runtime.engine.choice import Choice, choose, option_ids
from qvl_runtime.engine.score import Score, score_prompt
from qvl_runtime.prompt.chatml import Prompt, PromptEncoder
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.core import EngineCore


class Judging:
    """The methods of `Engine` that judge given texts, between the steps of requests."""

    core: EngineCore
    tokenizer: Tokenizer
    _prompts: PromptEncoder

    def score(self, prompt: Prompt, return_logits: bool = False, adapter: str | None = None) -> Score:
        """Return the log probability of each token of a prompt after the first, pad ids of images included.

        adapter: one of the engine's; None: the base model.
        """
        self.check_process()
        encoded = self._prompts.encode(prompt)
        with self.exclusive():
            return score_prompt(self.core, encoded, return_logits, adapter)

    def choose(self, prompt: Prompt, options: Sequence[str]) -> Choice:
        """Return how likely each of the given answers to a prompt is, such as "A", "B" and "C": nothing is generated.

        The prompt is computed once, or found in the prefix cache. Raises `PromptError` for options that are empty or
        equal, `CapacityError` for a prompt that is too long, and `NumericsError` for logits that are not finite.
        """
        self.check_process()
        ids = option_ids(self.tokenizer, options)
        encoded = self._prompts.encode(prompt)
        with self.exclusive():
            return choose(self.core, encoded, options, ids)

    def check_process(self) -> None:
        """Raise `ForkError` in a forked child of the process that made the engine."""
        raise NotImplementedError

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other threads from the core, between two steps, for callers of `core`."""
        raise NotImplementedError
