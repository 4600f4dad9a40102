"""Build items in background threads while earlier ones are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_THREADS = 4  # items in memory: one more than threads, and the one in use


def prefetch(items: Iterable[Item], build: Callable[[Item], Result]) -> Generator[tuple[Item, Result], None, None]:
    """Yield each item with its result of `build`, in order, while the next ones are built; close it when done early.

    Torch uses one core in each of these threads: other threads hash and write, and each torch operation would wait for
    a worker that they keep from running. On two cores that was 59 s of CPU instead of 19.
    """
    import torch

    cores = torch.get_num_threads()
    threads = min(MAX_THREADS, cores)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        try:
            for item in items:
                waiting.append((item, executor.submit(build, item)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
                    del future
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
                del future
        finally:
            executor.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)  # new threads inherit the number that any thread set last
