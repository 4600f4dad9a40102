"""Work that is done one item ahead, in a thread of its own, while the item before is written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(items: Iterable[Item], make: Callable[[Item], Result]) -> Generator[tuple[Item, Result], None, None]:
    """Each item with what `make` gives for it, in order, while it is at work on the next; close it when it is left.

    Torch takes one core there and no other: the rest are hashing and writing, and each of its operations would wait for
    a thread that one of these keeps from running. On two cores that was 59 s of CPU in place of 19.
    """
    import torch

    threads = torch.get_num_threads()
    waiting: tuple[Item, Future[Result]] | None = None
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as beside:
        try:
            for item in items:
                started = beside.submit(make, item)
                if waiting is not None:
                    yield waiting[0], waiting[1].result()
                waiting = item, started
            if waiting is not None:
                yield waiting[0], waiting[1].result()
        finally:
            beside.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # new threads take over what was set last, in whichever
