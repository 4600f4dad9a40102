"""Work that is done ahead, in threads of its own, while the items before are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST = 4  # threads; so many items and one more are made or wait beside the one in use, each held in memory


def ahead(items: Iterable[Item], make: Callable[[Item], Result]) -> Generator[tuple[Item, Result], None, None]:
    """Each item with what `make` gives for it, in order, while it is at work on the next; close it when it is left.

    Torch takes one core in each of these threads: others hash and write, and each of its operations would wait for a
    thread that one of those keeps from running. On two cores that was 59 s of CPU in place of 19.
    """
    import torch

    cores = torch.get_num_threads()
    makers = min(MOST, cores)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(makers, initializer=torch.set_num_threads, initargs=(1,)) as beside:
        try:
            for item in items:
                waiting.append((item, beside.submit(make, item)))
                if len(waiting) > makers:
                    first, made = waiting.popleft()
                    yield first, made.result()
                    del made
            while waiting:
                first, made = waiting.popleft()
                yield first, made.result()
                del made
        finally:
            beside.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)  # new threads take over what was set last, in whichever
