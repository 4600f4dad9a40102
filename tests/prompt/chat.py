"""What tests of prompts write: messages, two images, and ids spelled as the original does it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Tokenizer

RED = Image.new("RGB", (30, 20), "red")
BLUE = Image.new("RGB", (20, 30), "blue")
SIZE = 28


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def spell(tokenizer: Tokenizer, segment: Segment) -> list[int]:
    """Ids with each span spelled as the original does it."""
    ids = list(segment.ids)
    for slot in segment.slots:
        ids[slot.start : slot.start + tokenizer.n_queries] = tokenizer.spell_path(str(slot.source))
    return ids


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def special(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token >= tokenizer.n_ranks]
