"""The shared library of CPU kernels: it is found, loaded and wrapped in Python callables for one instruction set."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

ABI = 5  # the ABI of csrc/library.h, which the library must have been built with
_REBUILD = "rebuild it: pip install -e . (or python setup.py build_ext --inplace in a checkout)"

_KINDS = {"P": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
SIGNATURES = {  # P is a pointer, i an int64, d a double; csrc/ documents each argument
    "linear_int8": "PiiiiPPPPiiiPP",
    "linear_exact": "PiiiiPPPPiiiPP",
    "linear_dense": "PiiiPiPP",
    "dequantize": "PPPiiiiiPiiiP",
    "rms_norm": "PPiiiPdPP",
    "layer_norm": "PiiiPPdP",
    "swiglu": "PiiiP",
    "gelu": "PiiP",
    "rotary_to_cache": "PiiiiPPiPPPPiiiP",
    "attention": "PiiiiiPPiiiiiiPiiPPiP",
    "greedy": "PiiiPP",
    "gather_rows": "PiiPiP",
    "side_by_side": "PiPiiP",
    "rotary_tables": "PPiiiPPP",
    "pack_gptq": "PiiiiPP",
    "pack_dense": "PiiiiiPP",
    "read_memory": "PiP",
}


_log = logging.getLogger("qvl_kernels")
FALLBACKS: dict[str, str] = {}  # ops that ran in plain torch since the process started, and why, for the report


def warn_fallback(op: str, reason: str) -> None:
    """Record that an op runs in plain torch, with a warning the first time and for each new reason."""
    if FALLBACKS.get(op) != reason:
        FALLBACKS[op] = reason
        _log.warning("%s runs in plain torch, up to 10x slower than its C++ kernel: %s", op, reason)


class LibraryError(RuntimeError):
    """The CPU kernels cannot run here; the message says why and what to do about it."""


class Library:
    """The kernels for one instruction set, as attributes of `kernels`; `threads` follows torch's setting."""

    def __init__(self, instruction_set: str | None = None) -> None:
        """Load the kernels for an instruction set, such as "avx2" or "portable"; None selects this CPU's best.

        Raises `LibraryError` if the library was not built or does not support the instruction set.
        """
        handle = _load()
        handle.qvl_instruction_sets.restype = ctypes.c_char_p
        handle.qvl_kernel.restype = ctypes.c_void_p
        handle.qvl_kernel.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p))
        self.checked = bool(handle.qvl_checked())  # sizes and indices are compared at the entry of each kernel
        self.available = tuple(handle.qvl_instruction_sets().decode().split())
        self.instruction_set = instruction_set or self.available[0]
        if self.instruction_set not in self.available:
            raise LibraryError(
                f"the requested instruction set is {self.instruction_set!r}; this CPU and build support "
                f"{', '.join(self.available)}"
            )
        self._entry: Callable[[bytes, bytes], int] = handle.qvl_entry
        handle.qvl_entry.restype = ctypes.c_void_p
        handle.qvl_entry.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        self.kernels = SimpleNamespace(**{name: self._kernel(handle, name) for name in SIGNATURES})
        self._set_threads: Callable[[int], None] = handle.qvl_set_threads
        handle.qvl_set_threads.argtypes = (ctypes.c_int64,)
        self._log_chunks: Callable[[object, int], int] = handle.qvl_log_chunks
        handle.qvl_log_chunks.argtypes, handle.qvl_log_chunks.restype = (
            (ctypes.c_void_p, ctypes.c_int64),
            ctypes.c_int64,
        )
        self.threads = 0  # the number last passed to the thread pool
        self.replay: Callable[[ctypes.Array[Any], int], None] = (
            handle.qvl_replay
        )  # runs the calls recorded by replay.py
        handle.qvl_replay.argtypes, handle.qvl_replay.restype = (ctypes.c_void_p, ctypes.c_int64), None
        self._recorders: dict[int, SimpleNamespace] = {}  # by thread id: the kernels that record

    def ready(self) -> SimpleNamespace:
        """Return the kernels, after setting torch's number of threads; if this thread records, those that record."""
        threads = torch.get_num_threads()
        if threads != self.threads:
            self._set_threads(threads)
            self.threads = threads
        return self._recorders.get(get_ident(), self.kernels) if self._recorders else self.kernels

    @property
    def records(self) -> bool:
        """Whether this thread is recording its kernel calls."""
        return bool(self._recorders) and get_ident() in self._recorders

    @contextmanager
    def recording(self, kernels: SimpleNamespace) -> Iterator[None]:
        """Replace this thread's kernels by `kernels`, which record their calls, inside the context."""
        self._recorders[get_ident()] = kernels
        try:
            yield
        finally:
            del self._recorders[get_ident()]

    def chunks(self, call: Callable[[], object], threads: int, capacity: int = 1 << 16) -> list[list[int]]:
        """Run kernels in `call` as `threads` threads would split them, but on this one; return ns of each chunk.

        A list for each part that the threads would share, in order; between two parts all threads wait for the last.
        """
        before, log = torch.get_num_threads(), (ctypes.c_int64 * capacity)()
        torch.set_num_threads(threads)
        self._log_chunks(log, capacity)
        try:
            call()
        finally:
            used = self._log_chunks(None, 0)
            torch.set_num_threads(before)
        if used > capacity:
            raise ValueError(f"the calls have {used} chunks and parts, and the log holds {capacity}: raise capacity")
        parts, at = [], 0
        while at < used:
            parts.append(log[at + 1 : at + 1 + log[at]])
            at += 1 + log[at]
        return parts

    def entry(self, name: str) -> int:
        """Return the address of a kernel's entry, which identifies it in recorded calls."""
        return self._entry(self.instruction_set.encode(), name.encode())

    def _kernel(self, handle: ctypes.CDLL, name: str) -> Callable[..., None]:
        signature = ctypes.c_char_p()
        address = handle.qvl_kernel(self.instruction_set.encode(), name.encode(), ctypes.byref(signature))
        arguments = (signature.value or b"").decode()
        if not address or arguments != SIGNATURES[name]:
            raise LibraryError(
                f"{handle._name} was built from other sources: its kernel {name!r} takes {arguments or 'nothing'}, "
                f"this version passes {SIGNATURES[name]}; {_REBUILD}"
            )
        kernel: Callable[..., None] = ctypes.CFUNCTYPE(None, *(_KINDS[k] for k in SIGNATURES[name]))(address)
        return kernel


_active: Library | None = None


def library() -> Library:
    """Return the library in use, loaded on the first call; `QVL_CPU_ISA` overrides the best instruction set."""
    global _active
    if _active is None:
        _active = Library(os.environ.get("QVL_CPU_ISA") or None)
    return _active


@contextmanager
def instruction_set(name: str) -> Iterator[Library]:
    """Use another instruction set's kernels inside the context, for tests and benchmarks."""
    global _active
    before, _active = _active, Library(name)
    try:
        yield _active
    finally:
        _active = before


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor for a kernel, or None, a null pointer, for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def _load() -> ctypes.CDLL:
    override = os.environ.get("QVL_CPU_LIBRARY")  # another build, such as that of `make asan`
    package = Path(__file__).parents[1]
    built = [path for suffix in EXTENSION_SUFFIXES for path in package.glob(f"_cpu{suffix}")]
    # the newest: an editable install names it with Python's tag and build_ext without, and one may be left from before
    built.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    paths = [Path(override)] if override else built
    if not paths:
        raise LibraryError(
            f"the CPU kernels were not built (no C++ compiler at install time?): install g++ and {_REBUILD}"
        )
    try:
        handle = ctypes.CDLL(str(paths[0]))
    except OSError as fault:
        raise LibraryError(f"{paths[0].name} cannot be loaded ({fault}): {_REBUILD}") from fault
    abi = handle.qvl_abi() if hasattr(handle, "qvl_abi") else "none"
    if abi != ABI:
        raise LibraryError(
            f"{paths[0]} was built from other sources: its ABI is {abi}, this version needs {ABI}; {_REBUILD}"
        )
    return handle
