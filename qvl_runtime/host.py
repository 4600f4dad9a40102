"""The machine that the package runs on: its devices, memory and CPU time. The only reader of /proc."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from qvl_kernels import report as kernel_report
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError

PROC = Path("/proc")
UNKNOWN_AVAILABLE = 4 * 2**30  # bytes: a conservative default when the OS does not report its memory


def choose_device(name: str) -> torch.device:
    """Resolve a device name: "auto" is a GPU if torch can use one, otherwise the CPU.

    Raises `ConfigError` for an unknown name and for a device that is not usable.
    """
    EngineConfig(device=name)  # checks the name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        version = torch.__version__
        reason = f"torch {version} finds none" if torch.version.cuda else f"torch {version} was built without CUDA"
        raise ConfigError(
            f"device is {name!r}, but there is no usable GPU ({reason}): use device='cpu' or device='auto'"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    try:
        kernel_report(device)
    except (ValueError, RuntimeError) as error:  # the kernels that QVL_KERNELS or QVL_CPU_ISA request cannot run
        raise ConfigError(str(error)) from error
    return device


def choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Resolve a dtype name: "auto" is the dtype in the checkpoint's config."""
    dtype: torch.dtype = getattr(torch, config.dtype if name == "auto" else name)
    return dtype


def device_name(device: torch.device) -> str:
    """Name a device for people: "cuda:0 (NVIDIA A100-SXM4-80GB)" or "cpu (AMD EPYC 9R14, 2 threads)"."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"


def cpu_name() -> str:
    """Return the CPU's model name as the OS reports it."""
    for line in _lines("cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def has_bfloat16_products() -> bool:
    """Whether torch multiplies bfloat16 on this CPU by instructions of its own, or at least by oneDNN's kernels.

    Otherwise (AVX2 and older) its products of bfloat16 take some ten times as long as float32's.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # none in a build without oneDNN
    return supported is not None and bool(supported())


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device; 0 if the OS does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 0


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device.

    On a CPU this is Linux's MemAvailable, page cache included; on other systems half of the memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _kib("meminfo", "MemAvailable:")
    if available is not None:
        return available
    return total_memory(device) // 2 or UNKNOWN_AVAILABLE


def resident_memory() -> int:
    """Return the bytes of this process that are in RAM; 0 if the OS does not report them."""
    return _kib("self/status", "VmRSS:") or 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak_memory`, or since the process started if that has no effect.

    On a GPU these are bytes that torch allocated; on a CPU the resident memory of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = _kib("self/status", "VmHWM:")
    if peak is not None:
        return peak
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Start measuring `peak_memory` from here; has no effect on a CPU if the OS does not support it."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clear = PROC / "self" / "clear_refs"
    if clear.exists():
        try:
            clear.write_text("5")  # "reset the peak resident set size", proc(5)
        except OSError:
            return


def is_file_mapping(address: int) -> bool:
    """Whether an address of this process is in a mapping of a file; False if the OS does not report mappings."""
    maps = PROC / "self" / "maps"
    if not maps.is_file():
        return False
    with maps.open() as lines:
        for line in lines:  # "first-end perms offset device inode path"; other memory has inode 0, proc(5)
            first, _, rest = line.partition("-")
            if int(first, 16) <= address < int(rest[: rest.index(" ")], 16):
                return line.split(maxsplit=5)[4] != "0"
    return False


def machine_cpu_seconds() -> float:
    """Return the CPU seconds that all processes of the machine have used since it started (Linux only)."""
    ticks = [int(field) for field in _lines("stat")[0].split()[1:9]]  # entries 3 and 4 are idle and iowait
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def process_cpu_seconds(process: int) -> float:
    """Return the CPU seconds, user and system, that the process of this id has used (Linux only)."""
    fields = "\n".join(_lines(f"{process}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kib(file: str, field: str) -> int | None:
    """Return a field of a /proc file that is given in KiB, as bytes."""
    for line in _lines(file):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def _lines(file: str) -> list[str]:
    path = PROC / file
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
