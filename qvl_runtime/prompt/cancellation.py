"""Cancel the reading of images from another thread: what it waits for, a socket or a process, is ended at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Canceled(Exception):
    """The request was canceled. No caller waits for its answer, so this is no error of the user's."""


class Cancellation:
    """A switch that a request's thread looks at, and that runs what ends its present wait. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end_wait: Callable[[], None] | None = None
        self.is_set = False

    def cancel(self) -> None:
        """Cancel the request. Returns once its present wait is ended, if it was in one."""
        with self._lock:
            self.is_set = True
            if self._end_wait is not None:
                self._end_wait()

    def check(self) -> None:
        """Raise `Canceled` if the request was canceled."""
        if self.is_set:
            raise Canceled

    @contextmanager
    def ending_with(self, end_wait: Callable[[], None]) -> Iterator[None]:
        """Have `cancel` call `end_wait` while the body runs, which must then return or raise soon.

        Raises `Canceled` before and after the body if the request was canceled, whatever the body raised. `end_wait`
        must not wait, and is not called after the body has ended. Bodies may be nested: the innermost is ended.
        """
        with self._lock:
            self.check()
            outer, self._end_wait = self._end_wait, end_wait
        try:
            yield
        finally:
            with self._lock:
                self._end_wait = outer
            self.check()


NEVER = Cancellation()
"""For callers that do not cancel. It is shared, so nothing may cancel it."""
