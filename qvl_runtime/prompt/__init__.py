"""Prompts of text and images to token ids, and generated ids back to text; independent of weights.

The names below are loaded on first use: the process that decodes images imports this package and needs few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_runtime.prompt.boxes import Box as Box
    from qvl_runtime.prompt.boxes import parse_boxes as parse_boxes
    from qvl_runtime.prompt.chatml import EncodedPrompt as EncodedPrompt
    from qvl_runtime.prompt.chatml import ImageSpan as ImageSpan
    from qvl_runtime.prompt.chatml import Prompt as Prompt
    from qvl_runtime.prompt.chatml import PromptEncoder as PromptEncoder
    from qvl_runtime.prompt.chatml import decode_answer as decode_answer
    from qvl_runtime.prompt.drawing import draw_boxes as draw_boxes
    from qvl_runtime.prompt.images import ImageSource as ImageSource
    from qvl_runtime.prompt.images import LoadedImage as LoadedImage
    from qvl_runtime.prompt.images import load_image as load_image
    from qvl_runtime.prompt.images import to_pixels as to_pixels
    from qvl_runtime.prompt.limits import ImageLimits as ImageLimits
    from qvl_runtime.prompt.listformat import from_list_format as from_list_format
    from qvl_runtime.prompt.listformat import to_list_format as to_list_format
    from qvl_runtime.prompt.streaming import StopMatcher as StopMatcher
    from qvl_runtime.prompt.streaming import StreamDecoder as StreamDecoder
    from qvl_runtime.prompt.tokenizer import Tokenizer as Tokenizer

_NAMES = {
    "boxes": ("Box", "parse_boxes"),
    "chatml": ("EncodedPrompt", "ImageSpan", "Prompt", "PromptEncoder", "decode_answer"),
    "drawing": ("draw_boxes",),
    "images": ("ImageSource", "LoadedImage", "load_image", "to_pixels"),
    "limits": ("ImageLimits",),
    "listformat": ("from_list_format", "to_list_format"),
    "streaming": ("StopMatcher", "StreamDecoder"),
    "tokenizer": ("Tokenizer",),
}
_MODULES = {name: f"qvl_runtime.prompt.{module}" for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
