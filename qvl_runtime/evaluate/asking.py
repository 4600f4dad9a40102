"""Ask an engine the questions of a run, many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from typing import Any, NamedTuple, Protocol

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import QVLError
from qvl_runtime.evaluate.choice import one_of, single_tokens
from qvl_runtime.evaluate.prompts import Question
from qvl_runtime.schedule.api import Completion, SamplingParams

Numbered = tuple[int, Question]


PICTURES = 32  # whose first questions are asked before the second ones of the same pictures


class Reply(NamedTuple):
    """An answer as text; of a choice, the letter."""

    text: str
    tokens: int = 0  # generated
    likelihoods: tuple[float, ...] = ()  # of each option: mean log probability of its tokens; empty where it is written


class Asker(Protocol):
    """What answers questions: an engine of this process, or a server."""

    chat_format: str  # "raw" for a base model

    def answers(self, questions: Iterable[Numbered]) -> Iterator[tuple[int, Reply | QVLError]]:
        """Answer all questions, in any order; one that fails yields its error."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What answers, for the settings of a run: another identity may answer otherwise."""
        ...


def interleaved(questions: Iterable[Numbered]) -> Iterator[Numbered]:
    """Questions in an order in which those about one picture find its prompt already computed.

    Asked at the same time, each would compute it. So the first questions about some pictures come first, then the
    second ones, and so on; then the next pictures.
    """
    by_picture: dict[str, list[Numbered]] = {}
    for number, question in questions:
        by_picture.setdefault(question.picture, []).append((number, question))
    pictures = iter(by_picture.values())
    while some := list(islice(pictures, PICTURES)):
        for turn in zip_longest(*some):
            yield from (question for question in turn if question is not None)


class EngineAsker:
    """An engine, which shares images and prompts between questions and computes them together."""

    def __init__(self, engine: Engine, checkpoint: str) -> None:
        """checkpoint: a hash of its files."""
        self.engine, self._checkpoint = engine, checkpoint
        self.chat_format = engine.defaults.chat_format

    def identity(self) -> Mapping[str, Any]:
        """Checkpoint, dtypes and precision."""
        report = self.engine.report()
        config = self.engine.engine_config
        return {
            "checkpoint": self._checkpoint,
            "dtype": report["dtype"],
            "precision": config.precision,
            "kv_dtype": config.kv_dtype,
            "device": config.device if config.device != "auto" else report["device"],
        }

    def answers(self, questions: Iterable[Numbered]) -> Iterator[tuple[int, Reply | QVLError]]:
        """All run together, but choices of which an option is more than one token."""
        together, alone = self._parted(interleaved(questions))
        asked = dict(together)
        requests = ((number, question.prompt, self._params(question)) for number, question in together)
        for number, result in self.engine.as_completed(requests):
            yield number, result if isinstance(result, QVLError) else self._reply(result, asked.pop(number))
        for number, question in alone:
            try:
                yield number, self._scored(question)
            except QVLError as error:
                yield number, error

    def _parted(self, questions: Iterable[Numbered]) -> tuple[list[Numbered], list[Numbered]]:
        """Those that run together, and those whose options are scored one after another."""
        parted: tuple[list[Numbered], list[Numbered]] = ([], [])
        for number, question in questions:
            parted[bool(question.choices) and self._tokens(question) is None].append((number, question))
        return parted

    def _tokens(self, question: Question) -> tuple[int, ...] | None:
        return single_tokens(self.engine.tokenizer, question.choices)

    def _scored(self, question: Question) -> Reply:
        found = self.engine.choose(question.prompt, question.choices).mean_logprobs
        best = max(range(len(found)), key=found.__getitem__)
        return Reply(question.choices[best].strip(), 0, found)

    def _params(self, question: Question) -> SamplingParams:
        if question.choices:
            return one_of(self._tokens(question) or ())
        if not question.raw:
            return SamplingParams(temperature=0, max_tokens=question.max_tokens)
        return SamplingParams(
            temperature=0,
            min_tokens=question.min_tokens,
            max_tokens=question.max_tokens,
            end_of_text_only=True,
        )

    def _reply(self, completion: Completion, question: Question) -> Reply:
        if question.choices:
            at = (self._tokens(question) or ()).index(completion.token_ids[0])
            return Reply(question.choices[at].strip(), 1)
        if not question.raw:
            return Reply(completion.text, completion.usage.completion_tokens)
        # As the original decodes: `</box>` and what follows a Chat checkpoint's `<|im_end|>`, without the tags.
        text = self.engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return Reply(text, completion.usage.completion_tokens)
