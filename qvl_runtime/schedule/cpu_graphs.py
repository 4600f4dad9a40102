"""Decode graphs on a CPU: recordings of the kernel calls of a step, for `decode_graphs`.

Nothing is captured ahead of time: the first step of each batch size runs op by op and is recorded. Each batch size has
its own recording, because a row of padding would cost as much as a row of a request.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qvl_kernels.cpu.library import library
from qvl_kernels.cpu.replay import Arena, Recording

BUCKETS = range(1, 65)  # batch sizes; in larger steps the overhead of Python is negligible


class CpuCapture:
    """Records on first use. All recordings share one arena, as they never run at the same time."""

    def __init__(self) -> None:
        self._arena = Arena()

    def __call__(self, function: Callable[[], Tensor]) -> RecordedStep:
        """Return `function` as a step that is recorded when it first runs."""
        return RecordedStep(function, self._arena)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared arena."""
        return self._arena.nbytes


class RecordedStep:
    """A function over static buffers: its first run is recorded and later ones replay it, until the kernels change."""

    def __init__(self, function: Callable[[], Tensor], arena: Arena) -> None:
        self._function, self._arena = function, arena
        self._cached_recording: Recording | None = None

    @property
    def fallback_reason(self) -> str | None:
        """Why the step runs op by op; None if it is recorded or has not run yet."""
        recording = self._recording
        return None if recording is None else recording.fallback_reason

    def __call__(self) -> Tensor:
        """Run or replay the step. The next call overwrites the result."""
        recording = self._recording
        if recording is None:
            self._cached_recording, output = Recording.of(self._function, self._arena)
            return output
        if recording.fallback_reason is not None:
            return self._function()
        return recording.replay()

    @property
    def _recording(self) -> Recording | None:
        """The recording, if it was made with the kernels that are in use."""
        return (
            self._cached_recording
            if self._cached_recording is not None and self._cached_recording.library is library()
            else None
        )
