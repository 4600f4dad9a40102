"""The processes of a tensor-parallel model and what they send one another: torch.distributed, gloo and NCCL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qvl_runtime.errors import ConfigError, GroupError

_log = logging.getLogger("qvl_runtime")

FOREVER = timedelta(days=365)  # followers wait for the next step however long it takes until something is asked
START = timedelta(minutes=5)  # for all processes to be there
HOST = "127.0.0.1"
T = TypeVar("T")


def meeting_place(ranks: int, port: int | None = None) -> Any:
    """The store at which the ranks of this machine meet: the first one's, on a free port, or that at `port`."""
    store = dist.TCPStore  # type: ignore[attr-defined]
    return store(HOST, port or 0, ranks, is_master=port is None, wait_for_workers=False, timeout=START)


def arrival(rank: int) -> str:
    """The key by which a rank says at the meeting place that it is there."""
    return f"rank {rank} is here"


def check_free() -> None:
    """Raise `ConfigError` where this process is in a process group already."""
    if dist.is_initialized():
        raise ConfigError(
            "tensor_parallel makes a process group of torch.distributed, and this process has one: one such engine a "
            "process, and none under torchrun"
        )


def leave() -> None:
    """Leave the process group, if this process is in one, so that it can be in another."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Group:
    """This process as rank `rank` of `ranks`. All methods are collective: every rank calls them in the same order.

    They raise `GroupError` once a rank has ended.
    """

    def __init__(self, store: Any, rank: int, ranks: int, device: torch.device) -> None:
        """Meet the other ranks at `store`."""
        self.rank, self.ranks, self.device = rank, ranks, device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        self._or_ended(
            lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=FOREVER)
        )

    def command(self, command: Any = None) -> Any:
        """Give a command of the first rank, which passes it, to all others; every rank returns it."""
        box = [command]
        self._or_ended(lambda: dist.broadcast_object_list(box, src=0, device=torch.device("cpu")))
        return box[0]

    def broadcast(self, x: Tensor) -> Tensor:
        """Copy a contiguous tensor of the first rank into those of the others, and return it."""
        self._or_ended(lambda: dist.broadcast(x.view(torch.uint8), src=0))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return x [n, out] of every rank, [ranks, n, out] in order."""
        every = x.new_empty(self.ranks, *x.shape)
        self._or_ended(lambda: dist.all_gather(list(every.unbind(0)), x.contiguous()))
        return every

    def collect(self, x: Tensor, widths: list[int]) -> Tensor | None:
        """Send x [n, widths[rank]] to the first rank, which returns all next to each other, [n, sum(widths)]."""
        if self.rank:
            self._or_ended(lambda: dist.send(x.contiguous().view(torch.uint8), dst=0))
            return None
        parts = [x, *(x.new_empty(len(x), width) for width in widths[1:])]
        for rank, part in enumerate(parts[1:], 1):
            self._or_ended(lambda part=part, rank=rank: dist.recv(part.view(torch.uint8), src=rank))  # type: ignore[misc]
        return torch.cat(parts, 1)

    def meet(self) -> None:
        """Wait for every rank to come here."""
        self.gather(torch.zeros(1, device=self.device))

    def _or_ended(self, collective: Callable[[], T]) -> T:
        try:
            return collective()
        except RuntimeError as error:
            _log.debug("%s", error)
            raise GroupError(
                f"one of the {self.ranks} processes of this model has ended, killed or out of memory: make the engine "
                "again, and see in the system's log why it did"
            ) from None
