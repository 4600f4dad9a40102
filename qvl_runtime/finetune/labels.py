"""What a conversation teaches: its tokens in ChatML, and which of them the model learns to predict.

Two choices. "original" is the mask of the published finetune.py: of system and user turns `<|im_start|>`, `<|im_end|>`
and the newline after it are learned; of answers also their text, but not the word "assistant" and its newline. So the
headers of all turns have a small part in the loss. "answers" learns the answers and their `<|im_end|>` alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.chatml import DEFAULT_SYSTEM
from qvl_runtime.prompt.records import Conversation, Message
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not learned
LabelKind = Literal["original", "answers"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)


class Labeled(NamedTuple):
    """A conversation as a training sample."""

    segment: Segment  # n token ids, and where the images are
    labels: list[int]  # n: the id of a token that is learned, `IGNORED` for others

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: the first token of a sample has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def labeled(
    tokenizer: Tokenizer, conversation: Conversation, kind: LabelKind = "original", system: str = DEFAULT_SYSTEM
) -> Labeled:
    """The tokens and labels of a conversation, every tag in its texts interpreted, as in the original.

    A first turn that is not the user's is left out, as in the original. system: for a conversation without a system
    text. Raises `PromptError` that names the record for a tag that is not closed.
    """
    newline = tokenizer.encode("\n", "none")
    segment, labels = Segment(), list[int]()
    for role, text in _turns(conversation, system):
        head = [tokenizer.im_start, *tokenizer.encode(role, "none"), *newline]
        try:
            content = tokenizer.encode_tagged(text)
        except PromptError as error:
            raise PromptError(f"{conversation.where}: {error}") from error
        segment.extend(head, content, [tokenizer.im_end], newline)
        answer = role == "assistant"
        original = kind == "original"
        labels += [tokenizer.im_start if original else IGNORED, *[IGNORED] * (len(head) - 1)]
        labels += content.ids if answer else [IGNORED] * len(content)
        labels += [tokenizer.im_end if original or answer else IGNORED]
        labels += newline if original else [IGNORED] * len(newline)
    return Labeled(segment, labels)


def _turns(conversation: Conversation, system: str) -> list[Message]:
    messages = list(conversation.messages)
    if messages and messages[0].role != "user":
        del messages[0]
    return [Message("system", system if conversation.system is None else conversation.system), *messages]
