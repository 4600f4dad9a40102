"""Parts of messages, and what they are encoded as."""

from __future__ import annotations

from typing import Any

from PIL import Image

RED = Image.new("RGB", (30, 20), "red")
CORNERS = [[1, 2], [30, 4], [31, 60], [2, 58]]
QUAD = "<quad>(1,2),(30,4),(31,60),(2,58)</quad>"


def user(*content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content), **more}
