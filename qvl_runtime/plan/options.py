"""What a plan is made for: the choices of the user, the workload, and the results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.config.checks import require_choice
from qvl_runtime.weights.manifest import Manifest, is_converted

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The choices that decide how much memory a model needs. Raises `ConfigError` for unsupported ones."""

    dtype: str = "auto"
    vision: str = "keep"  # or "int8"
    head: str = "keep"  # or "int8", "int4"
    kv: str = "auto"  # or "int8"
    embedding_on_host: bool = False  # GPU: embeddings are read from the host's mapped file
    max_step_tokens: int = 1024  # tokens that a step computes at most
    mapped: tuple[str, ...] = (
        "vision",
        "embedding",
    )  # CPU: parts that are pages of a file, resident once read

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, ("auto", *ITEM_SIZE))
        require_choice("vision", self.vision, ("keep", "int8"))
        require_choice("head", self.head, ("keep", "int8", "int4"))
        require_choice("kv", self.kv, ("auto", "int8"))


def checkpoint_options(folder: Path, dtype: str, precision: str = "exact", kv: str = "auto") -> PlanOptions:
    """The options of an engine that loads a checkpoint folder.

    A converted folder fixes vision and head; an engine with precision "fast" rounds them itself where they are float.
    """
    manifest = Manifest.read(folder) if is_converted(folder) else None
    vision, head = (manifest.vision, manifest.head) if manifest is not None else ("keep", "keep")
    rounds = precision == "fast" and vision == "keep"
    if precision == "fast":
        vision, head = ("int8" if part == "keep" else part for part in (vision, head))
    options = PlanOptions(dtype, vision, head, kv)
    return replace(options, mapped=("embedding",)) if rounds else options


class Workload(NamedTuple):
    """The load at the moment of the highest memory use."""

    tokens: int  # in the KV cache, of all requests together
    prompt: int  # tokens computed in prefill; the rest are generated one by one
    images: int = 0  # whose features are cached


class Peak(NamedTuple):
    """Bytes at the moment of the highest memory use, by purpose."""

    vision: int
    language: int
    embedding: int
    head: int
    kv: int
    features: int
    workspace: int
    reserved: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self)


class Capacity(NamedTuple):
    """What fits next to the weights."""

    tokens: int
    images: int
