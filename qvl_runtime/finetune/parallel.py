"""Several processes, started by torchrun: each computes its share of a step's micro-batches.

Gradients are summed once a step, after accumulation, so that nothing depends on which parameters a sample touches: a
row of text leaves the resampler's gradient at zero. That is what DistributedDataParallel does under `no_sync`, without
a wrapper around the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qvl_runtime.errors import ConfigError


class Team:
    """The processes of a run; of one process, every method does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all processes, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)

    def totals(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        values = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.add([values])
        return [float(value) for value in values]

    def wait(self) -> None:
        """Return once every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def joined_team(sharding: str) -> Iterator[Team]:
    """The team that torchrun describes in the environment; one process where it does not.

    Raises `ConfigError` for `sharding` without torchrun, and for several processes without `sharding`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and sharding == "none":
        raise ConfigError(f"torchrun started {size} processes, and sharding is 'none': use 'data', or 'fsdp' to shard")
    if sharding != "none" and "RANK" not in os.environ:
        raise ConfigError(f"sharding is {sharding!r}, and this is one process: start it by torchrun")
    if sharding == "none":
        yield Team()
        return
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Team(rank, size)
    finally:
        dist.destroy_process_group()
