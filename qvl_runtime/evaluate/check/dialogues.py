"""The dialogues that the authors documented on their demo picture, and those of a user's file.

The authors sampled, with top-p 0.3 to 0.8; here answers are greedy. A documented answer is also scored token by token,
which tells more where the two part: how many of its tokens are the likeliest here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_runtime.errors import DataError
from qvl_runtime.evaluate.readers.folder import Record
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.text import read_text

DEMO_PICTURE = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"
KINDS = ("chat", "base")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and the documented answer, with grounding tags as the model writes them."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A documented dialogue about one picture. Each turn is asked after the documented answers before it."""

    name: str
    kind: str  # "chat": chat turns; "base": the picture and the text, continued
    turns: tuple[Turn, ...]
    picture: str | None = None  # None: the one that the user names


DOCUMENTED = (
    Dialogue(
        "Qwen-VL-Chat",
        "chat",
        (
            Turn("这是什么?", "图中是一名女子在沙滩上和狗玩耍，旁边是一只拉布拉多犬，它们处于沙滩上。"),
            Turn("框出图中击掌的位置", "<ref>击掌</ref><box>(536,509),(588,602)</box>"),
        ),
    ),
    Dialogue(
        "Qwen-VL-Chat v1.0.0 (ModelScope)",
        "chat",
        (
            Turn(
                "这是什么",
                "图中是一名年轻女子在沙滩上和她的狗玩耍，狗的品种是拉布拉多。她们坐在沙滩上，狗的前腿抬起来，与人互动。",
            ),
            Turn("输出击掌的检测框", '<ref>"击掌"</ref><box>(211,412),(577,891)</box>'),
        ),
    ),
    Dialogue(
        "Qwen-VL",
        "base",
        (
            Turn(
                "Generate the caption in English with grounding:",
                "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref><box>(219,424),(576,896)</box> "
                "playing on the beach",
            ),
        ),
    ),
)


def documented(chat_format: str) -> list[Dialogue]:
    """The dialogues of checkpoints with this format of chats."""
    kind = "base" if chat_format == "raw" else "chat"
    return [dialogue for dialogue in DOCUMENTED if dialogue.kind == kind]


def read_dialogues(path: Path) -> list[Dialogue]:
    """Read a JSON list of {"name", "kind", "picture", "turns": [{"question", "answer"}]}.

    A relative path of a picture is taken from the folder of the file. Raises `DataError` for anything else.
    """
    try:
        content: Any = parse_json(read_text(path, DataError), str(path), DataError)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} holds no list of dialogues; expected one such as docs/evaluation.md shows")
    found = []
    for number, entry in enumerate(content):
        record = Record(entry, f"{path} dialogue {number}")
        kind = record.text("kind")
        if kind not in KINDS:
            raise DataError(f"{record.where} has kind {kind!r}; expected {' or '.join(KINDS)}")
        turns = [Record(turn, record.where) for turn in record.get("turns", list)]
        picture = str(record.values["picture"]) if record.values.get("picture") else None
        if picture is not None and not picture.startswith(("http:", "https:", "data:")):
            picture = str(path.parent / picture)
        both = tuple(Turn(turn.text("question"), turn.text("answer")) for turn in turns)
        if not both or (kind == "base" and len(both) > 1):
            raise DataError(f"{record.where} has {len(both)} turns; expected one, or several of kind chat")
        found.append(Dialogue(record.text("name"), kind, both, picture))
    return found
