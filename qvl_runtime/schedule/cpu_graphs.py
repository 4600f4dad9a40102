"""Recorded calls of CPU kernels as the capture of `decode_graphs`.

Nothing runs ahead of time: the first step of each batch size runs op by op and is recorded. Each number of
rows has a recording of its own, since a row of padding would cost as much as a request's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qvl_kernels.cpu.library import library
from qvl_kernels.cpu.replay import Arena, Recording

BUCKETS = range(1, 65)  # of rows; a longer step takes so long that Python's part is lost in it


class CpuCapture:
    """Records on first use. All recordings share one arena, as they never run at the same time."""

    def __init__(self) -> None:
        self._arena = Arena()

    def __call__(self, function: Callable[[], Tensor]) -> RecordedStep:
        return RecordedStep(function, self._arena)

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes


class RecordedStep:
    """A function over static buffers: the first run is recorded, later ones replay it; other kernels record again."""

    def __init__(self, function: Callable[[], Tensor], arena: Arena) -> None:
        self._function, self._arena = function, arena
        self._cached_recording: Recording | None = None

    @property
    def fallback_reason(self) -> str | None:
        recording = self._recording
        return None if recording is None else recording.fallback_reason

    def __call__(self) -> Tensor:
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
