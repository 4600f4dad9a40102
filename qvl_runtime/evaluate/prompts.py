"""What the model is asked: the original's prompts, character for character, and the same questions as chat turns.

The original's evaluation gives base and Chat checkpoints one raw completion prompt; only MME and TouchStone are asked
as chat turns. A raw prompt ends at `<|endoftext|>` alone, so that a Chat checkpoint runs on to the limit, as it did
there.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from qvl_runtime.errors import ConfigError, PromptError
from qvl_runtime.evaluate.samples import LETTERS, Sample
from qvl_runtime.prompt.chatml import DEFAULT_SYSTEM

STYLES = ("original", "chat")
VERSION = 1  # of the prompts of this file; a change of any makes a new one
FIELDS = ("images", "question", "hint", "options")
_CHATML = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Form:
    """How the questions of a kind of task are asked."""

    original: str  # with {images}, {question}, {hint}, {options}
    chat: str  # the text of a chat turn after its images
    is_chat: bool = False  # the original asks it as a chat turn
    letters: str = ""  # what precedes the letter of an option that is chosen by likelihood, in the original style
    choice: bool = False


CAPTION = Form("{images}Describe the image in English:", "Describe the image in English:")
ANSWER = Form("{images}{question} Answer:", "{question} Answer with a word or a short phrase.")
OPTIONS = Form(
    "{images}Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:",
    "Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer with the letter of the right option.",
    letters=" ",
    choice=True,
)
SEED = replace(
    OPTIONS,
    original="{images}\nQuestion: {question}\nOptions: {options}\nAnswer:",
    chat="Question: {question}\nOptions: {options}\nAnswer with the letter of the right option.",
)
BOX = Form("{images}<ref>{question}</ref><box>", "框出图中{question}的位置")
YES_NO = Form("{images}\n{question}", "{question}", is_chat=True)
OPEN = Form("{images}\n{question}", "{question}", is_chat=True)
SCENE = Form("Picture 1:{images}\n{question}", "{question}", is_chat=True)  # a chat turn of this package, spelled out


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how its answer is taken."""

    prompt: Any  # a string with tags, or messages
    raw: bool  # ends at <|endoftext|> alone; special tokens are dropped from the answer
    choices: tuple[str, ...] = ()  # the answers to choose from by likelihood; empty: it is written
    min_tokens: int = 0
    max_tokens: int = 0
    digest: str = ""  # SHA-256 of the prompt with the names of its images, not their folders
    picture: str = ""  # questions with the same one share the beginning of their prompts


@dataclass(frozen=True, slots=True)
class Style:
    """How a run asks."""

    name: str = "original"
    template: str | None = None  # the text of its prompts instead of the form's
    shots: int = 0  # examples before each question, in the original style

    def __post_init__(self) -> None:
        """Raises `ConfigError` for an unknown style or field, and for examples in chat turns."""
        if self.name not in STYLES:
            raise ConfigError(f"style is {self.name!r}; supported are {' and '.join(STYLES)}")
        if self.shots < 0 or (self.shots and self.name == "chat"):
            raise ConfigError(f"shots is {self.shots}; expected 0 or more, and examples need style='original'")
        for field in _FIELD.findall(self.template or ""):
            if field not in FIELDS:
                raise ConfigError(f"prompt has the field {{{field}}}; supported are {', '.join(FIELDS)}")

    def text(self, form: Form) -> str:
        """The template of a form in this style."""
        return self.template or (form.original if self.name == "original" else form.chat)

    def ask(self, sample: Sample, form: Form, limits: tuple[int, int], examples: Sequence[Sample] = ()) -> Question:
        """The question of a sample; `limits` are the fewest and most tokens of its answer."""
        template = self.text(form)
        names = [_name(image) for image in sample.images]
        if self.name == "original":
            shown = "".join(f"{_filled(template, one, one.images)} {_answer(one)}" for one in examples)
            prompt: Any = shown + _filled(template, sample, sample.images)
            named = "".join(f"{_filled(template, one, [*map(_name, one.images)])} {_answer(one)}" for one in examples)
            named += _filled(template, sample, names)
            if form.is_chat:
                prompt, named = (_CHATML.format(system=DEFAULT_SYSTEM, text=text) for text in (prompt, named))
        else:
            parts = [{"image": image} for image in sample.images]
            text = _filled(template, sample, [])
            prompt = [{"role": "user", "content": [*parts, {"text": text}]}]
            named = "\n".join([*names, text])
        before = form.letters if self.name == "original" else ""
        choices = tuple(before + letter for letter in LETTERS[: len(sample.options)]) if form.choice else ()
        digest = hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()
        raw = self.name == "original" and not form.is_chat
        fewest = limits[0] if self.name == "original" else 0
        return Question(prompt, raw, choices, fewest, limits[1], digest, sample.picture)


def drawn_examples(train: Sequence[Sample], shots: int, count: int, seed: int = 0) -> list[Sequence[Sample]]:
    """For each of `count` questions, `shots` examples drawn one question after another, as the original's loader did.

    It seeds Python's generator once. Its published runs used worker processes, whose draws cannot be had again.
    """
    if shots > len(train):
        raise PromptError(f"shots is {shots}, and the training file has {len(train)} questions: take fewer")
    rng = random.Random(seed)
    return [rng.sample(train, shots) for _ in range(count)]


def _filled(template: str, sample: Sample, images: Sequence[str]) -> str:
    """The template with its fields filled in, each once: what a question holds is not searched for fields."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options, strict=False))
    tags = [f"<img>{image}</img>" for image in images]
    values = {
        "images": ("\n" if sample.part == "video" else "").join(tags),
        "question": sample.question,
        "hint": sample.hint or "N/A",
        "options": options,
    }
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), template)


def _answer(sample: Sample) -> str:
    """The text of an example's answer: the first where there are several."""
    reference = sample.references[0] if sample.references else ""
    return str(reference["answer"] if isinstance(reference, dict) else reference)


def _name(image: str) -> str:
    """The name of an image's file, or a hash of the image that a file holds."""
    if image.startswith("data:"):
        return hashlib.sha256(image.encode()).hexdigest()
    return PurePath(image).name
