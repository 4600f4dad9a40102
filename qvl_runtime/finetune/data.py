"""The training data: every record of a file as token ids, labels and images, with all faults found before the start."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qvl_runtime.errors import ConfigError, PromptError, QVLError, quoted
from qvl_runtime.finetune.keeping import Predictions
from qvl_runtime.finetune.labels import IGNORED, LabelKind, labeled
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.conversations import read_with_faults
from qvl_runtime.prompt.records import Conversation
from qvl_runtime.prompt.segment import ImageSlot
from qvl_runtime.prompt.tokenizer import Tokenizer

TOO_LONG, NOTHING = "longer than the maximum length", "nothing to learn"
_IMAGE = re.compile(r"<img>.*?</img>", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One conversation, ready to be learned: n tokens."""

    conversation: Conversation
    ids: array[int]  # n
    labels: array[int]  # n, `IGNORED` where a token is not learned
    images: tuple[ImageSlot, ...]  # with the index of the first pad id
    keep: bool = False  # whether its tokens are predicted as before training, instead of learned
    kept: Predictions | None = None  # what a sample to keep is trained towards, once that is known

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


class FaultyDataError(PromptError):
    """The data has faults; `faults` has each of them, the message the first ones."""

    def __init__(self, path: Path, faults: Sequence[QVLError]) -> None:
        listed = "; ".join(str(fault) for fault in faults[:2])
        more = f" (and {len(faults) - 2} more)" if len(faults) > 2 else ""
        count, them = ("1 faulty record", "it") if len(faults) == 1 else (f"{len(faults)} faulty records", "them")
        super().__init__(f"{path} has {count}: {listed}{more}: correct {them}, or use skip_bad")
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The samples of a file, in its order, and what was left out."""

    path: Path
    samples: list[Sample]
    left_out: Counter[str] = field(default_factory=Counter)  # records by reason
    faults: tuple[QVLError, ...] = ()  # of records that were skipped

    @property
    def num_targets(self) -> int:
        """Tokens that an epoch predicts."""
        return sum(sample.num_targets for sample in self.samples)

    @property
    def num_kept(self) -> int:
        """Those of them that are predicted as before training."""
        return sum(sample.num_targets for sample in self.samples if sample.keep)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(map(len, self.samples))

    def joined(self, kept: Dataset) -> Dataset:
        """This data with that of another file, whose answers are to stay as they are."""
        samples = [*self.samples, *(replace(sample, keep=True) for sample in kept.samples)]
        return replace(self, samples=samples, left_out=self.left_out + kept.left_out, faults=self.faults + kept.faults)

    def digest(self) -> str:
        """SHA-256 of all ids, labels and image sources: what a resumed run must find again."""
        total = hashlib.sha256()
        for sample in self.samples:
            total.update(sample.ids.tobytes() + sample.labels.tobytes() + repr(sample.images).encode())
            total.update(b"keep" * sample.keep)
        return total.hexdigest()


def read_dataset(
    path: Path, tokenizer: Tokenizer, max_length: int, labels: LabelKind = "original", skip_bad: bool = False
) -> Dataset:
    """Read, check and tokenize a fine-tuning file. No sample is ever cut.

    A record over `max_length` tokens, and one without a token to learn, is left out and counted. Raises
    `FaultyDataError` with every fault of the file, unless `skip_bad` leaves faulty records out, and `ConfigError` if
    nothing is left.
    """
    reading = read_with_faults(path)
    faults: list[QVLError] = list(reading.faults)
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    for conversation in reading.conversations:
        found = record_faults(conversation)
        sample = None
        if not found:
            try:
                sample = make_sample(tokenizer, conversation, labels)
            except PromptError as error:
                found = [error]
        faults += found
        if sample is None:
            continue
        if len(sample) > max_length:
            left_out[TOO_LONG] += 1
        elif not sample.num_targets:
            left_out[NOTHING] += 1
        else:
            samples.append(sample)
    if faults and not skip_bad:
        raise FaultyDataError(path, faults)
    if not samples:
        if not left_out and not faults:
            raise ConfigError(f"{path} has no records; expected conversations")
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none too long"
        raise ConfigError(
            f"{path} leaves nothing to train on ({counts}, {len(faults)} faulty): raise the maximum length of "
            f"{max_length} tokens, or correct the records"
        )
    return Dataset(path, samples, left_out, tuple(faults))


def make_sample(tokenizer: Tokenizer, conversation: Conversation, labels: LabelKind = "original") -> Sample:
    """Tokenize one conversation. Raises `PromptError` for a tag that is not closed."""
    segment, own = labeled(tokenizer, conversation, labels)
    return Sample(conversation, array("q", segment.ids), array("q", own), tuple(segment.slots))


def record_faults(conversation: Conversation) -> list[QVLError]:
    """Every fault of one record that its tokens would hide: boxes, tags, and files that are not images."""
    faults: list[QVLError] = []
    for number, message in enumerate(conversation.messages, start=1):
        where = f"{conversation.where}, message {number}"
        try:
            parse_boxes(_IMAGE.sub("", message.text), strict=True)
        except PromptError as error:
            faults.append(PromptError(f"{where}: {error}"))
        for match in _IMAGE.finditer(message.text):
            reason = _no_image(match[0][len("<img>") : -len("</img>")])
            if reason:
                faults.append(PromptError(f"{where}: {reason}"))
    return faults


def _no_image(source: str) -> str:
    """Why a file is no image by its first bytes; empty for an image, and for what is not a file on this machine."""
    from PIL import Image

    if re.match(r"(https?:|data:)", source):
        return ""
    try:
        with Image.open(source):
            return ""
    except Exception as error:  # of any of PIL's readers
        return f"{quoted(source)} cannot be read as an image ({type(error).__name__}): replace the file"
