"""What an engine tells besides answers: the likelihood of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from qvl_runtime.engine.choice import Choice, choose, option_ids
from qvl_runtime.engine.locating import Located, check_number, locate, score_boxes, spelled_boxes
from qvl_runtime.engine.score import Score, score_prompt
from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.boxes import Box
from qvl_runtime.prompt.chatml import Draft, Prompt, PromptEncoder
from qvl_runtime.prompt.images import ImageSource
from qvl_runtime.prompt.segment import Segment
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

    def locate(
        self, image: ImageSource, phrase: str, k: int = 1, question: str | None = None, system: str | None = None
    ) -> Located:
        """Find what a phrase names in an image: up to k boxes, the likeliest first, with scores.

        Whatever the model would rather say, it is made to write a box; `presence` and the boxes' `details` tell whether
        to believe it. The prompt is `<img>..</img><ref>phrase</ref>`, as in the original's evaluation; with a
        `question`, such as "Box the {}." where {} stands for the phrase, it is a chat whose answer begins so. The
        default is what the checkpoint's calibration was fitted with. k > 1 searches with 4 k beams, and boxes that
        overlap by more than 0.7 are one. Raises `PromptError`, `ImageError` and the errors of `generate`.
        """
        check_number(k)
        encoded = self._prompts.read_images(self.draft_phrase(image, phrase, question, system))
        with self.exclusive():
            return locate(self.core, self.core.answers.judge, encoded, phrase, k)

    def score_boxes(
        self,
        image: ImageSource,
        phrase: str,
        boxes: Sequence[Box | Sequence[int]],
        question: str | None = None,
        system: str | None = None,
    ) -> list[Box]:
        """Return given boxes, [x1, y1, x2, y2] on the 0-1000 grid, with scores: how well each fits the phrase.

        `details.logprob` is the log probability of the box, given that the model writes one; the prompt is that of
        `locate`. Raises `PromptError` for a box without an area.
        """
        spelled = spelled_boxes(self.tokenizer, boxes)
        encoded = self._prompts.read_images(self.draft_phrase(image, phrase, question, system))
        with self.exclusive():
            return score_boxes(self.core, self.core.answers.judge, encoded, phrase, spelled)

    def draft_phrase(
        self, image: ImageSource, phrase: str, question: str | None = None, system: str | None = None
    ) -> Draft:
        """Encode the text of the prompt of `locate`, up to `</ref>`; `read_images` makes it complete."""
        self.check_process()
        if not isinstance(phrase, str) or not phrase.strip():
            raise PromptError(f"the phrase is {quoted(phrase)}; expected what to look for, as 'the red car'")
        if question is not None and not isinstance(question, str):
            raise PromptError(f"the question is {quoted(question)}; expected text, as 'Box the {{}}.'")
        tokens = self.tokenizer
        calibration = self.core.answers.judge.calibration
        if question is None and calibration is not None:
            question = calibration.question
        if question is None:
            draft = Draft(Segment().extend(tokens.image_span(image)))
        else:
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question.replace("{}", phrase)}]
            opening = [] if system is None else [{"role": "system", "content": system}]
            draft = self._prompts.draft_chat([*opening, {"role": "user", "content": parts}])
        label = [tokens.ref_start, *tokens.encode(phrase, "none"), tokens.ref_end]
        return draft._replace(segment=Segment().extend(draft.segment, label))

    def check_process(self) -> None:
        """Raise `ForkError` in a forked child of the process that made the engine."""
        raise NotImplementedError

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other threads from the core, between two steps, for callers of `core`."""
        raise NotImplementedError
