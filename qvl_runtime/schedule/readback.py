"""Copies between host and device that do not wait for the work that is queued on the device.

An ordinary copy waits for all of it, such as the next step, which is launched before the tokens of the last are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Moment:
    """A place in the queue of a device that the host can wait for; on a CPU nothing is queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None  # None: nothing to wait for

    def mark(self) -> None:
        """Move it behind everything that is queued."""
        if self._device.type == "cuda":
            self._event = self._event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the device has got there."""
        if self._event is not None:
            self._event.synchronize()


class Readback:
    """Copies of tensors on their way to the host, queued when it is made; on a CPU the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: all on one device."""
        self._tensors = [_to_pinned(tensor) for tensor in tensors]
        self._copied = Moment(tensors[0].device if tensors else torch.device("cpu"))
        self._copied.mark()

    def read(self) -> list[Tensor]:
        """Wait for the copies, and return them in the order of the tensors."""
        self._copied.wait()
        return self._tensors


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Queue a copy of a tensor of the host on a device; on a CPU the tensor itself."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _to_pinned(tensor: Tensor) -> Tensor:
    """Queue a copy in memory that the device writes to itself: for other memory, the host would wait."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
