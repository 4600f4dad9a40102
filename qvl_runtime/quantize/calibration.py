"""Calibration data: conversations as tokens and images, and the residual stream before block 0."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import ops_for
from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError, ImageError, PromptError
from qvl_runtime.model.linear import LinearBuilder
from qvl_runtime.model.vision import VisionEncoder
from qvl_runtime.prompt.conversations import conversation_segment, read_conversations
from qvl_runtime.prompt.images import LoadedImage, load_image, to_pixels
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.records import Conversation
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.quantize.sample_conversations import sample_conversations
from qvl_runtime.weights.checkpoint import Checkpoint

HELD_OUT_EVERY = 8  # one conversation in eight is held out to measure errors on
IMAGES_AT_ONCE = 4


class Sample(NamedTuple):
    """One conversation as the model reads it."""

    token_ids: list[int]
    images: list[tuple[int, LoadedImage]]  # with the index of the first pad id


class Calibration(NamedTuple):
    """The conversations to calibrate on, held-out ones last."""

    samples: list[Sample]
    held_out: int  # samples
    shortened: int  # samples that were cut to the maximum length

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.token_ids) for sample in self.samples]

    def digest(self) -> str:
        """SHA-256 of all tokens and images."""
        total = hashlib.sha256()
        for sample in self.samples:
            total.update(repr((sample.token_ids, [(start, image.digest) for start, image in sample.images])).encode())
        return total.hexdigest()


def read_calibration(
    config: ModelConfig, folder: Path, file: Path | None, count: int, max_tokens: int, limits: ImageLimits | None = None
) -> Calibration:
    """Draw `count` conversations from a fine-tuning file, or from the built-in set, and tokenize them.

    folder: the checkpoint with its vocabulary. Conversations over `max_tokens` are cut, never inside an image. Raises
    `PromptError` or `ImageError` that names the record, and `ConfigError` for fewer than two conversations.
    """
    tokenizer = Tokenizer.from_folder(folder, config.visual.n_queries, config.visual.image_start_id)
    conversations = sample_conversations(count) if file is None else read_conversations(file)
    drawn = random.Random(0).sample(conversations, min(count, len(conversations)))
    if len(drawn) < 2:
        raise ConfigError(f"there are {len(drawn)} conversations to calibrate on; expected 2, better 64 or more")
    samples, shortened = [], 0
    for conversation in drawn:
        sample, complete = _read(config, tokenizer, conversation, max_tokens, limits)
        samples.append(sample)
        shortened += not complete
    return Calibration(samples, cdiv(len(samples), HELD_OUT_EVERY), shortened)


@torch.inference_mode()
def embed(config: ModelConfig, checkpoint: Checkpoint, calibration: Calibration, x: Tensor) -> None:
    """Fill x [n, D], on its device and in its dtype, with the input of block 0: embeddings and image features."""
    ids = torch.tensor([token for sample in calibration.samples for token in sample.token_ids])
    x.copy_(F.embedding(ids, checkpoint.tensor("transformer.wte.weight")))
    image_starts, images, start = [], [], 0
    for sample in calibration.samples:
        image_starts += [start + offset for offset, _ in sample.images]
        images += [image for _, image in sample.images]
        start += len(sample.token_ids)
    if not images:
        return
    prefix = "transformer.visual."
    state = {name: checkpoint.tensor(name).to(x) for name in checkpoint.names if name.startswith(prefix)}
    encoder = VisionEncoder(config.visual, LinearBuilder(ops_for(x.device), state, "exact"))
    for first in range(0, len(images), IMAGES_AT_ONCE):
        batch = images[first : first + IMAGES_AT_ONCE]
        pixels = torch.cat([to_pixels(image.rgb[None]) for image in batch]).to(x.device)
        for image_start, features in zip(image_starts[first:], encoder.forward(pixels), strict=False):
            x[image_start : image_start + len(features)] = features


def _read(
    config: ModelConfig, tokenizer: Tokenizer, conversation: Conversation, max_tokens: int, limits: ImageLimits | None
) -> tuple[Sample, bool]:
    segment = conversation_segment(tokenizer, conversation)
    end = _cut([slot.start for slot in segment.slots], config.visual.n_queries, len(segment), max_tokens)
    images = []
    for number, slot in enumerate(segment.slots, start=1):
        if slot.start < end:
            try:
                image = load_image(slot.source, config.visual.image_size, limits, name=f"image {number}")
            except ImageError as error:
                raise PromptError(f"{conversation.where}: {error}") from error
            images.append((slot.start, image))
    return Sample(segment.ids[:end], images), end == len(segment)


def _cut(starts: Sequence[int], span: int, length: int, limit: int) -> int:
    """How many of `length` tokens to keep: `limit`, or fewer, so that no image span that begins at `starts` is cut."""
    if length <= limit:
        return length
    last = bisect_right(starts, limit) - 1
    if last >= 0 and limit <= starts[last] + span:
        return starts[last] - 1  # its <img> is cut, too
    return limit
