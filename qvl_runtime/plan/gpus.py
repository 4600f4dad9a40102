"""GPUs by name: memory as the driver reports it, and bandwidth as the vendor specifies it."""

from __future__ import annotations

from typing import NamedTuple

from qvl_runtime.errors import ConfigError


class Device(NamedTuple):
    """The memory of a GPU or a computer that a model is planned for."""

    name: str
    memory: int  # bytes
    bandwidth: float | None  # bytes per second; None: unknown
    reserved: int = 0  # bytes that are not the model's: the driver's context, or the process without a model


CONTEXT = 600 << 20  # a CUDA context with some dozens of kernels loaded; 450 to 650 MiB by driver and card
_MIB = {  # name: (MiB, GB/s)
    "a100-40": (40960, 1555),
    "a100-80": (81920, 2039),
    "h100": (81559, 3350),
    "h200": (143771, 4800),
    "3090": (24576, 936),
    "4090": (24564, 1008),
    "a10": (23028, 600),
    "l4": (23034, 300),
    "l40s": (46068, 864),
}
_TOO_OLD = {"t4": 7.5, "v100": 7.0, "p100": 6.0, "2080ti": 7.5}


def gpu(name: str) -> Device:
    """A GPU of the table. Raises `ConfigError` for one that is not in it, or that the kernels cannot run on."""
    key = name.lower().replace(" ", "-").replace("rtx-", "").replace("rtx", "").removesuffix("gb")
    if key in _TOO_OLD:
        raise ConfigError(
            f"the {name.upper()} has compute capability {_TOO_OLD[key]}; the kernels need 8.0 or higher (A10, 3090, "
            "A100 and later), for bfloat16 and asynchronous copies"
        )
    if key not in _MIB:
        raise ConfigError(f"gpu is {name!r}; known are {', '.join(_MIB)}")
    mib, rate = _MIB[key]
    return Device(key.upper(), mib << 20, rate * 1e9, CONTEXT)
