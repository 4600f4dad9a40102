"""Ask an engine many questions about many images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.progress import track

from qvl_runtime import Engine, SamplingParams

AT_ONCE = 64  # questions in one call: they share steps, and those about one image its prompt


def ask(engine: Engine, images: np.ndarray, which: Sequence[int], questions: Sequence[str]) -> list[str]:
    """Answer each question about its image as a chat of one turn, greedily, many at once."""
    params = SamplingParams(temperature=0, max_tokens=120)
    messages = [
        [{"role": "user", "content": [{"image": images[i]}, {"text": question}]}]
        for i, question in zip(which, questions, strict=True)
    ]
    answers: list[str] = []
    for start in track(range(0, len(messages), AT_ONCE), description="asking"):
        answers += [reply.text for reply in engine.generate(messages[start : start + AT_ONCE], params)]
    return answers
