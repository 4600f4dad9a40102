"""Prompts of text and images to token ids, and generated ids back to text; independent of weights."""

from __future__ import annotations

from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.chatml import EncodedPrompt, ImageSpan, Prompt, PromptEncoder, decode_answer
from qvl_runtime.prompt.drawing import draw_boxes
from qvl_runtime.prompt.images import ImageSource, LoadedImage, load_image, to_pixels
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.listformat import from_list_format, to_list_format
from qvl_runtime.prompt.streaming import StopMatcher, StreamDecoder
from qvl_runtime.prompt.tokenizer import Tokenizer

__all__ = [
    "Box",
    "EncodedPrompt",
    "ImageLimits",
    "ImageSource",
    "ImageSpan",
    "LoadedImage",
    "Prompt",
    "PromptEncoder",
    "StopMatcher",
    "StreamDecoder",
    "Tokenizer",
    "decode_answer",
    "draw_boxes",
    "from_list_format",
    "load_image",
    "parse_boxes",
    "to_list_format",
    "to_pixels",
]
