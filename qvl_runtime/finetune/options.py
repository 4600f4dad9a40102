"""The options of a fine-tuning run, with the defaults of the published scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from qvl_runtime.config.checks import require_at_most, require_choice, require_positive
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.finetune.labels import LABEL_KINDS, LabelKind
from qvl_runtime.formats.adapter import AdapterConfig

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
PARTS = ("decoder", "embedding", "head", "resampler", "vit")
FULL_PARTS = ("decoder", "embedding", "head", "resampler")  # the original freezes the ViT alone
MOST_EPOCHS = 10_000  # the steps of all are planned before the first
DTYPES = ("auto", "bfloat16", "float32")
SHARDING = ("none", "data", "gradients", "fsdp")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What is trained and how. Raises `ConfigError` for a value out of range."""

    method: Method = "lora"
    labels: LabelKind = "original"
    epochs: int = 5
    batch: int = 1  # samples of a micro-batch, unless they are packed
    accumulate: int = 8  # micro-batches of a step, those of all processes together
    max_length: int = 2048  # tokens of a sample
    pack: bool = True  # fill micro-batches up to max_length
    rate: float = 1e-5
    weight_decay: float = 0.1
    beta2: float = 0.95
    warmup: float = 0.01  # share of the steps
    schedule: str = "cosine"  # of the rate after the warm-up: to zero, or constant
    clip: float = 1.0  # the gradient's norm
    mean: Literal["token", "batch"] = "token"  # of the losses of a step: of its tokens, or of its micro-batches
    dtype: str = "auto"  # of weights and activations; auto: bfloat16, or float32 for a float32 checkpoint
    masters: str = "float32"  # of the optimizer; bfloat16: no masters, weights are rounded at random
    checkpointing: bool = True
    parts: tuple[str, ...] = FULL_PARTS  # what `full` trains
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    seed: int = 0
    save_every: int = 1000  # steps
    keep: int = 2  # saved states
    evaluate_every: int = 0  # steps; 0: at the end alone, if there are held-out samples
    evaluate_samples: int = 16  # of them are answered by generation
    keep_weight: float = 1.0  # of a token to keep, when a learned one has 1
    most_faults: int = 5  # steps in a row without a finite gradient before the run stops
    feature_bytes: int = 2 << 30  # host memory for what frozen parts of the vision encoder computed
    sharding: str = "none"

    def __post_init__(self) -> None:
        require_choice("method", self.method, METHODS)
        require_choice("labels", self.labels, LABEL_KINDS)
        require_choice("mean", self.mean, ("token", "batch"))
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("masters", self.masters, ("float32", "bfloat16"))
        require_choice("sharding", self.sharding, SHARDING)
        require_choice("schedule", self.schedule, SCHEDULES)
        positive = ("epochs", "batch", "accumulate", "max_length", "rate", "clip", "save_every", "keep", "most_faults")
        require_positive(self, "", *positive, "keep_weight")
        require_at_most(self, "", {"epochs": MOST_EPOCHS})
        for name, least, below in (("warmup", 0, 1), ("beta2", 0, 1), ("weight_decay", 0, 100)):
            if not least <= getattr(self, name) < below:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least} and below {below}")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ConfigError(f"parts has {quoted(unknown[0])}; expected some of {', '.join(PARTS)}")
        if not self.parts:
            raise ConfigError(f"parts is empty, so nothing is trained; expected some of {', '.join(PARTS)}")

    @property
    def shards(self) -> bool:
        """Whether no process has all of the weights, gradients and moments."""
        return self.sharding in ("gradients", "fsdp")

    @property
    def uses_lora(self) -> bool:
        """Whether side paths are trained."""
        return self.method != "full"

    def check_model(self, config: ModelConfig) -> None:
        """Raise `ConfigError` where the method does not fit the checkpoint, naming the one that does."""
        if self.method == "qlora" and config.quantization is None:
            raise ConfigError("method is 'qlora', but the checkpoint is not quantized: use 'lora', or its Int4 version")
        if self.method != "qlora" and config.quantization is not None:
            other = "adapters over its packed weights" if self.method == "lora" else "packed weights"
            raise ConfigError(
                f"method is {self.method!r}, but the checkpoint is quantized to {config.quantization.bits} bits: use "
                f"'qlora' for {other}, or the float checkpoint"
            )

    def key(self) -> dict[str, Any]:
        """What decides the result of a run: only one with the same resumes another's state."""
        free = ("save_every", "keep", "evaluate_every", "evaluate_samples", "feature_bytes", "sharding", "most_faults")
        values = {name: value for name, value in asdict(self).items() if name not in free}
        if not self.uses_lora:
            values.pop("lora")
        for name, usual in (("schedule", "cosine"), ("keep_weight", 1.0)):
            if values[name] == usual:  # states of before there was another have none
                values.pop(name)
        return values
