"""Evaluation in the loop: held-out loss, and answers that the engine generates from the weights in training.

An answer is compared with the reference of its record: is the text the same, and how well do its boxes overlap. A low
loss says little about boxes; this says it while the run can still be stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from qvl_runtime.engine.engine import Engine
from qvl_runtime.finetune.data import Dataset, Sample, make_sample
from qvl_runtime.finetune.int4_linear import PackedLinear
from qvl_runtime.finetune.learner import Learner
from qvl_runtime.finetune.lora import SAVED_NAMES, adapter_of
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.model.cache_layout import bytes_per_token
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.records import Conversation
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.weights.loader import Weights

NAME = "training"  # of the adapter in training, to the engine
KV_TOKENS = 8192  # of the engine's cache
LONGEST_ANSWER = 512  # tokens


class Question(NamedTuple):
    """A held-out conversation up to its last answer, and that answer."""

    prompt: dict[str, object]  # token ids and images, as `Engine.generate` takes them
    reference: str


class Evaluation:
    """Scores the network of a learner on held-out samples."""

    def __init__(
        self, learner: Learner, tokenizer: Tokenizer, held_out: Dataset, source: Path, options: FinetuneOptions
    ) -> None:
        self.learner, self.held_out, self.source, self.options = learner, held_out, source, options
        asked = [question_of(tokenizer, s) for s in held_out.samples[: options.evaluate_samples] if has_answer(s)]
        self.questions = [] if options.shards else asked  # no process has all weights

    def __call__(self) -> dict[str, float]:
        """Held-out loss; of generated answers the share of exact ones, and the mean IoU of the references' boxes."""
        scores = {"held_out_loss": self.learner.mean_loss(self.held_out.samples)}
        if self.questions:
            scores |= score(self.answers(), [question.reference for question in self.questions])
        return scores

    def answers(self) -> list[str]:
        """The answers of the weights as they are, greedily, all questions together."""
        network = self.learner.network
        network.eval()
        lora = self.options.uses_lora
        longest = min(self.options.max_length + LONGEST_ANSWER, network.c.context_limit)
        engine = Engine(
            self.source,
            device=str(network.wte.weight.device),
            dtype=str(network.wte.weight.dtype).removeprefix("torch."),
            weights=engine_weights(network),
            adapters={NAME: adapter_of(network, self.options.lora)._replace(saved={})} if lora else {},
            max_model_len=longest,
            kv_cache_bytes=max(KV_TOKENS, longest) * bytes_per_token(network.c, network.wte.weight.dtype),
            graphs=False,  # capturing them takes memory that training has
            image_cache_bytes=64 << 20,
        )
        params = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER, adapter=NAME if lora else None)
        completions = engine.generate([question.prompt for question in self.questions], params)
        return [completion.text for completion in completions]


def engine_weights(network: Network) -> Weights:
    """The weights of a network as the engine takes them, without a copy; side paths are left out."""
    state: dict[str, Tensor] = {
        name: tensor.detach() for name, tensor in network.state_dict().items() if ".adapter." not in name
    }
    if network.lm_head is None:
        state["lm_head.weight"] = state[f"{SAVED_NAMES['wte']}.weight"]
    packed = {name: m.packed for name, m in network.named_modules() if isinstance(m, PackedLinear)}
    return Weights(state, packed)


def has_answer(sample: Sample) -> bool:
    """Whether a conversation ends with an answer."""
    messages = sample.conversation.messages
    return len(messages) > 1 and messages[-1].role == "assistant"


def question_of(tokenizer: Tokenizer, sample: Sample) -> Question:
    """The conversation of a sample as a prompt for its last answer."""
    whole = sample.conversation
    before = make_sample(tokenizer, Conversation(whole.where, whole.messages[:-1], whole.system))
    head = [tokenizer.im_start, *tokenizer.encode("assistant", "none"), *tokenizer.encode("\n", "none")]
    prompt = {"token_ids": [*before.ids, *head], "images": [slot.source for slot in before.images]}
    return Question(prompt, whole.messages[-1].text)


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The share of answers equal to their references, and the mean IoU over all boxes of the references, if any."""
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    overlaps: list[float] = []
    for answer, reference in zip(answers, references, strict=True):
        found = parse_boxes(answer)
        overlaps += [
            max((iou(box, b) for b in found if b.label == box.label), default=0.0) for box in parse_boxes(reference)
        ]
    scores = {"exact": sum(exact) / len(exact)}
    if overlaps:
        scores["box_iou"] = sum(overlaps) / len(overlaps)
        scores["box_iou_50"] = sum(overlap >= 0.5 for overlap in overlaps) / len(overlaps)
    return scores


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    common = max(0, w) * max(0, h)
    union = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - common
    return common / union if union > 0 else 0.0
