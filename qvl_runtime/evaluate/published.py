"""The published figures of Qwen-VL and Qwen-VL-Chat, by task and score, from the authors' README and evaluation pages.

TextVQA's, AI2D's and OCR-VQA's figures of Chat are quoted from memory in our sources and have not been verified.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """What the authors report for a score; None where they report nothing."""

    base: float | None = None  # Qwen-VL
    chat: float | None = None  # Qwen-VL-Chat

    def of(self, chat_format: str) -> float | None:
        """The figure of the checkpoint with this format of chats: "raw" is the base model's."""
        return self.base if chat_format == "raw" else self.chat


_MME_CHAT = {
    "perception": 1487.58,
    "cognition": 360.71,
    "existence": 158.33,
    "count": 150.00,
    "position": 128.33,
    "color": 170.00,
    "posters": 178.57,
    "celebrity": 120.59,
    "scene": 152.25,
    "landmark": 164.00,
    "artwork": 125.50,
    "OCR": 140.00,
    "commonsense_reasoning": 130.71,
    "numerical_calculation": 40.00,
    "text_translation": 147.50,
    "code_reasoning": 42.50,
}
_ONE = {  # of tasks with one published score, the headline
    "flickr": Published(85.8, 81.0),
    "nocaps": Published(121.4, 120.2),
    "vqav2_testdev": Published(78.8, 78.2),
    "okvqa_val": Published(58.6, 56.6),
    "gqa_testdev": Published(59.3, 57.5),
    "vizwiz_test": Published(35.2, 38.9),
    "textvqa_val": Published(63.8, 61.5),
    "docvqa_test": Published(65.1, 62.6),
    "chartqa": Published(65.7, 66.3),
    "ai2diagram": Published(62.3, 57.7),
    "ocrvqa_test": Published(75.7, 70.5),
    "scienceqa_test_img": Published(67.1, 68.2),
    "refcoco_val": Published(89.36, 88.55),
    "refcoco_testA": Published(92.26, 92.27),
    "refcoco_testB": Published(85.34, 84.51),
    "refcoco+_val": Published(83.12, 82.82),
    "refcoco+_testA": Published(88.25, 88.59),
    "refcoco+_testB": Published(77.21, 76.79),
    "refcocog_val": Published(85.58, 85.96),
    "refcocog_test": Published(85.48, 86.32),
    "grit_refexp": Published(78.22),
    "touchstone_en": Published(chat=645.2),  # Chat 1.1: 711.6
    "touchstone_cn": Published(chat=401.2),  # Chat 1.1: 481.7
}
_SEED = {"accuracy": Published(56.3, 58.2), "image": Published(62.3, 65.4), "video": Published(39.1, 37.8)}


def published(task: str, score: str, headline: bool) -> Published:
    """The figures of a score of a task; `headline` says that it is the task's first."""
    if task == "mme":
        return Published(chat=_MME_CHAT.get(score))
    if task == "seed_bench":
        return _SEED.get(score, Published())
    return _ONE.get(task, Published()) if headline else Published()
