"""The options of the engine, validated when they are made."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from qvl_runtime.config.checks import require_choice, require_positive, require_types
from qvl_runtime.config.model import DTYPES
from qvl_runtime.errors import ConfigError
from qvl_runtime.prompt.limits import CAN_ISOLATE, ImageLimits

PRECISIONS = ("exact", "fast")
_IMAGES = ImageLimits()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The options of `Engine`, independent of the checkpoint. Raises `ConfigError` for a value out of range."""

    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    dtype: str = "auto"  # "auto": the dtype in the checkpoint's config
    precision: Literal["exact", "fast"] = "exact"  # fast: kernels may use int8 activations, head and vision
    embedding_on_host: bool = False  # on a GPU: embeddings stay in the mapped file; saves 1.2 GB of the full model's
    synthetic: str | None = None  # "qwen-vl-chat" or "qwen-vl-chat-int4": random weights of those sizes, no checkpoint
    repeat_blocks: bool = False  # synthetic: all blocks share the memory of the first
    max_model_len: int | None = None  # tokens; None: the checkpoint's context_limit
    allow_files: bool = _IMAGES.allow_files  # images by their path on this machine
    allow_urls: bool | tuple[str, ...] = _IMAGES.allow_urls  # http(s) images: of any host, none, or those named
    allow_private_addresses: bool = _IMAGES.allow_private_addresses  # loopback, inside a network, link-local
    max_image_bytes: int = _IMAGES.max_image_bytes
    max_image_pixels: int = _IMAGES.max_image_pixels
    max_image_side: int = _IMAGES.max_image_side
    max_request_pixels: int = _IMAGES.max_request_pixels  # of all images of a request
    image_timeout_s: float = _IMAGES.image_timeout_s
    isolate_images: bool = CAN_ISOLATE  # decode files in worker processes, limited in time and memory
    max_images: int = _IMAGES.max_images  # a request
    transparency: str = _IMAGES.transparency  # "drop" the alpha channel, or put images on "white"
    exif_orientation: str = _IMAGES.exif_orientation  # "ignore", or "apply" to images and their boxes
    deep_pixels: str = _IMAGES.deep_pixels  # more than 8 bits: white is the type's "range", or "stretch" to the values
    image_cache_bytes: int = 256 * 2**20  # of image features; an image of the full model has 2 MiB
    kv_cache_bytes: int | None = (
        None  # None: on a CPU four contexts, at most half of the free memory; on a GPU what is left
    )
    kv_dtype: str = (
        "auto"  # "auto": the model's; "int8": half the memory of 16 bits, with a scale for each token and head
    )
    prefix_caching: bool = True
    max_running: int = 64  # answers in a step
    max_step_tokens: int = 1024  # prefill and decode together; longer prompts are prefilled in chunks
    graphs: bool = True  # capture decode steps once for each batch size and replay them without Python's overhead
    overlap: bool | None = None  # launch decode steps before the last one's tokens are read; None: on a GPU
    batch_invariant: bool = False  # on a GPU: the same bits alone and in any batch, at a cost; a CPU gives them always
    tensor_parallel: int = 1  # processes that the decoder is split among, each on a device of its own
    speculative_tokens: int = 0  # draft tokens from prompt lookup, verified in one step; 0: off

    def __post_init__(self) -> None:
        require_types(self)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise ConfigError(f"device is {self.device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
        require_choice("dtype", self.dtype, ("auto", *DTYPES))
        require_choice("precision", self.precision, PRECISIONS)
        require_positive(self, "", "image_cache_bytes")
        require_choice("kv_dtype", self.kv_dtype, ("auto", "int8"))
        require_positive(self, "", "max_running", "max_step_tokens")
        if self.kv_cache_bytes is not None:
            require_positive(self, "", "kv_cache_bytes")
        require_positive(self, "", "tensor_parallel")
        if self.speculative_tokens < 0:
            raise ConfigError(f"speculative_tokens is {self.speculative_tokens}; expected 0 (off) or more")
        self.image_limits  # noqa: B018 - constructing it validates the image fields
        if self.max_model_len is not None:
            require_positive(self, "", "max_model_len")

    @property
    def image_limits(self) -> ImageLimits:
        """The limits on the images of a prompt. Raises `ConfigError` for a value out of range."""
        return ImageLimits(**{option.name: getattr(self, option.name) for option in fields(ImageLimits)})
