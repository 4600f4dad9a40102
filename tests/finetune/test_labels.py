"""Which tokens are learned: against a second writing of the original's mask, on conversations of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import PromptError
from qvl_runtime.finetune.labels import IGNORED, labeled
from qvl_runtime.prompt.records import Conversation, Message
from qvl_runtime.prompt.tokenizer import Tokenizer

pytestmark = pytest.mark.unit
TOKENS = Tokenizer.from_folder(NANO, 64)
PICTURE = "Picture 1: <img>dog.jpg</img>\n"
# Every kind of record that the published README of fine-tuning shows.
KINDS: dict[str, list[tuple[str, str]]] = {
    "text": [("user", "你好"), ("assistant", "我是Qwen-VL,一个支持视觉输入的大模型。")],
    "boxes": [
        ("user", PICTURE + "图中的狗是什么品种?"),
        ("assistant", "图中是一只拉布拉多犬。"),
        ("user", "框出图中的格子衬衫"),
        ("assistant", "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>"),
    ],
    "two pictures": [
        ("user", PICTURE + "Picture 2: <img>Beijing.jpeg</img>\n图中都是哪"),
        ("assistant", "第一张图片是重庆的城市天际线,第二张图片是北京的天际线。"),
    ],
    "box in a question": [("user", PICTURE + "What is <box>(1,2),(3,4)</box>?"), ("assistant", "A dog.")],
    "assistant first": [("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Hello!")],
    "two users": [("user", "One"), ("user", "Two"), ("assistant", "Three")],
    "no answer": [("user", "Is anybody there?")],
    "an empty answer": [("user", "Say nothing"), ("assistant", "")],
    "tags of the template": [("user", "a<|im_end|>b"), ("assistant", "c<|endoftext|>")],
}


def conversation(turns: list[tuple[str, str]], system: str | None = None) -> Conversation:
    return Conversation("record 1", tuple(Message(*turn) for turn in turns), system)


def second_writing(turns: list[tuple[str, str]], system: str, answers: bool) -> list[tuple[int, int]]:
    """Pairs (id, label), turn by turn: the original's rule, word by word from its description."""
    encode = TOKENS.encode
    start, end, newline = encode("<|im_start|>")[0], encode("<|im_end|>")[0], encode("\n")[0]
    if turns[0][0] != "user":
        turns = turns[1:]
    pairs: list[tuple[int, int]] = []
    for role, text in [("system", system), *turns]:
        frame = (start, end, newline) if not answers else (IGNORED, IGNORED, IGNORED)
        pairs.append((start, frame[0]))
        pairs += [(token, IGNORED) for token in encode(role)]
        pairs.append((newline, IGNORED))
        pairs += [(token, token if role == "assistant" else IGNORED) for token in encode(text)]
        pairs.append((end, end if role == "assistant" else frame[1]))
        pairs.append((newline, frame[2]))
    return pairs


@pytest.mark.parametrize("kind", ["original", "answers"])
@pytest.mark.parametrize("name", KINDS)
def test_every_token(name: str, kind: str) -> None:
    segment, labels = labeled(TOKENS, conversation(KINDS[name]), kind)
    pairs = second_writing(KINDS[name], "You are a helpful assistant.", kind == "answers")
    assert list(zip(segment.ids, labels, strict=True)) == pairs


def test_the_first_record_of_the_readme_token_by_token() -> None:
    segment, labels = labeled(TOKENS, conversation([("user", "Hi"), ("assistant", "No")]))
    learned = [
        TOKENS.decode([token]) if label != IGNORED else "." for token, label in zip(segment.ids, labels, strict=True)
    ]
    shown = "".join(learned).replace("\n", "/")
    system = "." * (len(TOKENS.encode("system\nYou are a helpful assistant.")))
    user, assistant = "." * len(TOKENS.encode("user\nHi")), "." * len(TOKENS.encode("assistant\n"))
    frame = ("<|im_start|>", "<|im_end|>/")
    assert shown == f"{system.join(frame)}{user.join(frame)}<|im_start|>{assistant}No<|im_end|>/"


def test_a_system_text_of_the_record_is_used() -> None:
    segment, _ = labeled(TOKENS, conversation([("user", "a"), ("assistant", "b")], "Be brief."))
    assert TOKENS.decode(segment.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")


texts = st.lists(
    st.sampled_from(["dog", " ", "猫", "<box>(1,2),(3,4)</box>", PICTURE, "\n", "<ref>a</ref>"]), max_size=5
)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts.map("".join)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(turns)
def test_labels_are_the_tokens_themselves_and_never_a_question_or_its_picture(talk: list[tuple[str, str]]) -> None:
    if talk[0][0] != "user" and len(talk) == 1:
        return
    both = [labeled(TOKENS, conversation(talk), kind) for kind in ("original", "answers")]
    for segment, labels in both:
        assert len(labels) == len(segment)
        assert all(label in (IGNORED, token) for token, label in zip(segment.ids, labels, strict=True))
    (segment, original), (_, answers) = both
    assert all(label in (IGNORED, other) for label, other in zip(answers, original, strict=True))
    kept = talk if talk[0][0] == "user" else talk[1:]
    expected = sum(len(TOKENS.encode(text)) + 1 for role, text in kept if role == "assistant")
    assert sum(label != IGNORED for label in answers) == expected
    assert (
        sum(label != IGNORED for label in original) == expected + sum(2 if r == "assistant" else 3 for r, _ in kept) + 3
    )
    users = {slot.source for role, text in kept if role == "user" for slot in TOKENS.encode_tagged(text).slots}
    if users and not any("<img>" in text for role, text in kept if role == "assistant"):
        assert all(original[slot.start + i] == IGNORED for slot in segment.slots for i in range(64))


def test_a_tag_that_is_not_closed_names_the_record() -> None:
    with pytest.raises(PromptError, match=r"record 1.*<img>"):
        labeled(TOKENS, conversation([("user", "<img>dog.jpg"), ("assistant", "a")]))
