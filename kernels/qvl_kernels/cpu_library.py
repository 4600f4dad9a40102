"""The shared library of CPU kernels: found, loaded, and its kernels as Python callables for one instruction set."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import torch

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_KINDS = {"P": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_SIGNATURES = {  # P a pointer, i an integer, d a float; csrc/ says what each is
    "linear_int8": "PiiiiPPPPiiiPP",
    "linear_exact": "PiiiiPPPPiiiPP",
    "linear_dense": "PiiiPiPP",
    "dequantize": "PPPiiiiiPiiiP",
    "rms_norm": "PPiiiPdPP",
    "layer_norm": "PiiiPPdP",
    "swiglu": "PiiiP",
    "gelu": "PiiP",
    "rotary_to_cache": "PiiiiPPiPPPPiiP",
    "paged_attention": "PiiiiPPiiPiPPP",
    "pack_gptq": "PiiiiPP",
    "pack_dense": "PiiiiiPP",
    "advise_huge": "Pi",
    "read_memory": "PiP",
}


class LibraryError(RuntimeError):
    """The kernels cannot run here; the message says why."""


class Library:
    """The kernels for one instruction set, each an attribute; `threads` follows torch's setting."""

    def __init__(self, instruction_set: str | None = None) -> None:
        """instruction_set: "amx", "avx512", "avx2" or "portable"; None is the best that this CPU has.

        Raises `LibraryError` where the library was not built, or cannot run what is asked.
        """
        handle = _load()
        handle.qvl_instruction_sets.restype = ctypes.c_char_p
        handle.qvl_kernel.restype, handle.qvl_kernel.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_char_p)
        self.available = tuple(handle.qvl_instruction_sets().decode().split())
        self.instruction_set = instruction_set or self.available[0]
        if self.instruction_set not in self.available:
            raise LibraryError(
                f"the instruction set asked for is {self.instruction_set!r}; this CPU and build have "
                f"{', '.join(self.available)}"
            )
        self.kernels = SimpleNamespace(**{name: self._kernel(handle, name) for name in _SIGNATURES})
        self._set_threads: Callable[[int], None] = handle.qvl_set_threads
        handle.qvl_set_threads.argtypes = (ctypes.c_int64,)
        self._threads = 0

    def ready(self) -> SimpleNamespace:
        """The kernels, told how many threads torch may use."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._set_threads(threads)
            self._threads = threads
        return self.kernels

    def _kernel(self, handle: ctypes.CDLL, name: str) -> Callable[..., None]:
        address = handle.qvl_kernel(self.instruction_set.encode(), name.encode())
        if not address:
            raise LibraryError(f"{handle._name} has no kernel {name!r}: it was built from another version; build anew")
        kernel: Callable[..., None] = ctypes.CFUNCTYPE(None, *(_KINDS[k] for k in _SIGNATURES[name]))(address)
        return kernel


_active: Library | None = None


def library() -> Library:
    """The library in use, loaded at the first call; `QVL_CPU_ISA` names an instruction set instead of the best."""
    global _active
    if _active is None:
        _active = Library(os.environ.get("QVL_CPU_ISA") or None)
    return _active


@contextmanager
def instruction_set(name: str) -> Iterator[Library]:
    """Run another instruction set's kernels for a while, as tests and benchmarks do."""
    global _active
    before, _active = _active, Library(name)
    try:
        yield _active
    finally:
        _active = before


def _load() -> ctypes.CDLL:
    named = os.environ.get("QVL_CPU_LIBRARY")  # another build, such as that of `make asan`
    here = Path(__file__).parent
    found = [Path(named)] if named else [path for suffix in EXTENSION_SUFFIXES for path in here.glob(f"_cpu{suffix}")]
    if not found:
        raise LibraryError("the CPU kernels were not built (no C++ compiler at install time?): install g++, then anew")
    try:
        return ctypes.CDLL(str(found[0]))
    except OSError as fault:
        raise LibraryError(f"{found[0].name} cannot be loaded ({fault}): build anew") from fault
