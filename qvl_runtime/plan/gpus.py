"""Look up the memory of a GPU by name, for planning without one."""

from __future__ import annotations

from typing import NamedTuple

from qvl_kernels.gpus import GPUS, UNSUPPORTED
from qvl_runtime.errors import ConfigError


class Device(NamedTuple):
    """The memory of a GPU or a computer that a model is planned for."""

    name: str
    memory: int  # bytes
    bandwidth: float | None  # bytes per second; None: unknown
    reserved: int = 0  # bytes that are not the model's: the driver's context, or the process without a model


CONTEXT = 600 << 20  # a CUDA context with some dozens of kernels loaded; 450 to 650 MiB by driver and card
_GPUS = {gpu.key: gpu for gpu in GPUS if gpu.key}


def gpu(name: str) -> Device:
    """A GPU of the table. Raises `ConfigError` for one that is not in it, or that the kernels cannot run on."""
    key = name.lower().replace(" ", "-").replace("rtx-", "").replace("rtx", "").removesuffix("gb")
    if key in UNSUPPORTED:
        raise ConfigError(
            f"the {name.upper()} has compute capability {UNSUPPORTED[key] / 10}; the kernels need 8.0 or higher (A10, "
            "3090, A100 and later), for bfloat16 and asynchronous copies"
        )
    if key not in _GPUS:
        raise ConfigError(f"gpu is {name!r}; known are {', '.join(_GPUS)}")
    return Device(key.upper(), _GPUS[key].memory, float(_GPUS[key].bandwidth), CONTEXT)
