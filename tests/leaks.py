"""What a test leaves behind, whatever else the process holds: servers of other tests run on in it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any


def left_behind(now: Callable[[], Sequence[Any]]) -> Callable[[], list[Any]]:
    """Look at what there is, and return what tells later what has come since."""
    before = now()
    return lambda: [one for one in now() if all(one is not other for other in before)]


def instances(kind: type) -> list[Any]:
    """Every object of a type that the collector finds alive."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is kind]


def threads(*names: str) -> list[threading.Thread]:
    """The running threads whose names begin so."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]
