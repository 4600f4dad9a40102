"""A run that is killed: `python -m tests.evaluate.killed DATA OUT` answers one question each 20 ms."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QVLError
from qvl_runtime.evaluate.asking import Numbered, Reply
from qvl_runtime.evaluate.runner import RunOptions, run_task
from qvl_runtime.evaluate.tasks.table import TASKS


class Slow:
    """Answers each question with its number, in a while."""

    chat_format = "chatml"

    def identity(self) -> Mapping[str, Any]:
        return {"checkpoint": "slow"}

    def answers(self, questions: Iterable[Numbered]) -> Iterator[tuple[int, Reply | QVLError]]:
        for number, _ in questions:
            time.sleep(0.02)
            yield number, Reply(f"answer {number}", 1)


if __name__ == "__main__":
    run_task(TASKS["refcoco_val"], Slow(), RunOptions(Path(sys.argv[1])), Path(sys.argv[2]))
