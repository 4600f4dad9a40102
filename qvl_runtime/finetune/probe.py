"""How far two models are apart: KL divergence and logits on the answers of some conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import Engine
from qvl_runtime.finetune.data import Sample, make_sample
from qvl_runtime.finetune.labels import IGNORED
from qvl_runtime.finetune.merge import merged_state
from qvl_runtime.formats.adapter import Adapter
from qvl_runtime.host import choose_device, choose_dtype
from qvl_runtime.prompt.conversations import read_conversations
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.quantize.sample_conversations import sample_conversations
from qvl_runtime.weights.loader import Weights, load_weights

CONVERSATIONS, ROWS, LONGEST = 8, 32, 1024  # of the probe; rows of answers in each; tokens of each


class Distance(NamedTuple):
    """How far one model's predictions are from another's, over the rows of a probe."""

    kl: float  # mean KL divergence, in nats
    largest: float  # absolute difference of logits
    agreement: float  # share of rows with the same most likely token


def probe_samples(folder: Path, file: Path | None) -> list[Sample]:
    """Conversations to compare models on: the first of a fine-tuning file, or built-in ones."""
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, config.visual.n_queries, config.visual.image_start_id)
    conversations = sample_conversations(CONVERSATIONS) if file is None else read_conversations(file)
    samples = (make_sample(tokenizer, conversation, "answers") for conversation in conversations)
    limit = min(LONGEST, config.seq_length)
    return [sample for sample in samples if sample.num_targets and len(sample) <= limit][:CONVERSATIONS]


def answer_logits(
    folder: Path, samples: Sequence[Sample], adapter: Adapter | None = None, device: str = "cpu"
) -> list[Tensor]:
    """The logits [rows, vocab] in float32 of a model, with an adapter if given, where answers are predicted."""
    engine = _engine(folder, adapter, device)
    logits = []
    for sample in samples:
        prompt = {"token_ids": list(sample.ids), "images": [slot.source for slot in sample.images]}
        whole = engine.score(prompt, return_logits=True, adapter=None if adapter is None else "own").logits
        rows = [i for i, label in enumerate(sample.labels[1:]) if label != IGNORED][:ROWS]
        if whole is not None:
            logits.append(whole[rows].float().cpu())
    return logits


def distance(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Distance:
    """How far `other` is from `reference`, row by row."""
    first, second = torch.cat(list(reference)), torch.cat(list(other))
    logs, others = first.double().log_softmax(-1), second.double().log_softmax(-1)
    kl = float((logs.exp() * (logs - others)).sum(-1).mean())
    same = (first.argmax(-1) == second.argmax(-1)).double().mean()
    return Distance(max(0.0, kl), float((first - second).abs().max()), float(same))


def _engine(folder: Path, adapter: Adapter | None, device: str) -> Engine:
    """An engine of a checkpoint; parts of the adapter that side paths cannot hold are merged into its weights."""
    if adapter is None:
        return Engine(folder, device=device, max_model_len=LONGEST)

    def in_decoder(module: str) -> bool:
        return module.startswith("transformer.h.")

    weights: Weights | None = None
    if adapter.saved or not all(map(in_decoder, adapter.sides)):
        config = ModelConfig.from_folder(folder)
        loaded = load_weights(folder, config, choose_dtype("auto", config), choose_device(device))
        weights = loaded._replace(state=merged_state(loaded.state, adapter, in_decoder))
    sides = {module: side for module, side in adapter.sides.items() if in_decoder(module)}
    own = adapter._replace(sides=sides, saved={})
    return Engine(folder, device=device, adapters={"own": own}, weights=weights, max_model_len=LONGEST)
