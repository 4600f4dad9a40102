"""What tests of prompts write: messages, two images, and ids spelled as the original does it."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from typing import Any

from PIL import Image

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Tokenizer

RED = Image.new("RGB", (30, 20), "red")
BLUE = Image.new("RGB", (20, 30), "blue")
SIZE = 28


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def spell_path(tokenizer: Tokenizer, path: str) -> list[int]:
    """The ids that the *original* puts inside an image span: the bytes of the path, then pads up to n_queries.

    This package never feeds them to the model, but `Tokenizer.decode` reads them back. Raises `PromptError` for a path
    of more than n_queries bytes, as the original does.
    """
    path_bytes = unicodedata.normalize("NFC", path).encode("utf-8")
    if len(path_bytes) > tokenizer.n_queries:
        raise PromptError(f"{path[:60]!r} has {len(path_bytes)} bytes; the original spells {tokenizer.n_queries}")
    return [*path_bytes, *[tokenizer.img_pad] * (tokenizer.n_queries - len(path_bytes))]


def spell(tokenizer: Tokenizer, segment: Segment) -> list[int]:
    """Ids with each span spelled as the original does it."""
    ids = list(segment.ids)
    for slot in segment.slots:
        ids[slot.start : slot.start + tokenizer.n_queries] = spell_path(tokenizer, str(slot.source))
    return ids


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def special(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token >= tokenizer.n_ranks]
