"""Launches that Triton binds to their arguments, and compiles if that is wanted, but that never run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BACKEND, WARP = "cuda", 32  # threads
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a program can have, by capability


class Pointer:
    """What Triton's binding reads of a tensor: dtype and address."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """An address as aligned as that of a tensor at the beginning of an allocation, and the tensor's offset."""
        return 4096 + self._address


class Binary(NamedTuple):
    """A compiled kernel, as far as a launch reads it."""

    name: str
    key: str
    used: set[Key]
    function: int = 0
    packed_metadata: tuple[int, ...] = ()

    def launch_metadata(self, *_: Any) -> None:
        """None."""

    def run(self, *_: Any) -> None:
        """Note that it was used."""
        self.used.add((self.name, self.key))


Key = tuple[str, str]  # kernel, and Triton's key: types, alignment, constants and options


class Needs(NamedTuple):
    """What a compiled kernel needs, in bytes: shared memory a program, and stack a thread, of spilled registers."""

    shared: int
    stack: int


class Bound:
    """What was launched: names in order, and every distinct source."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sources: dict[Key, dict[str, Any]] = {}  # what Triton compiles once, by its constants
        self.needs: dict[Key, Needs] = {}  # of those that were compiled
        self.used: set[Key] = set()  # since it was last cleared
        self.eager = 0  # launches that the host made one by one
        self.replayed = 0  # launches inside of replayed graphs
        self._capturing: list[str] | None = None

    def launch(self, name: str) -> None:
        """Note a launch, of a kernel or of torch's operator."""
        if self._capturing is not None:
            self._capturing.append(name)
        else:
            self.eager += 1
            self.names.append(name)

    def described(self, key: Key) -> str:
        """A kernel by its name and constants."""
        return f"{key[0]} " + " ".join(f"{name}={value}" for name, value in self.sources[key].items())

    def replay(self, launches: list[str]) -> None:
        """Note the launches of a graph."""
        self.replayed += len(launches)
        self.names += launches

    @contextmanager
    def captured(self) -> Iterator[list[str]]:
        """Keep the launches inside of the block for a graph."""
        before, self._capturing = self._capturing, []
        try:
            yield self._capturing
        finally:
            self._capturing = before


def stack_of(cubin: bytes) -> int:
    """Bytes of stack a thread, as NVIDIA's tool in Triton's wheel reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", done.stdout)
    if found is None:
        raise ValueError(f"cuobjdump reports no stack: {done.stdout[:200]!r}")
    return int(found[1])


@contextmanager
def bound_launches(compiles: bool, capability: int) -> Iterator[Bound]:
    """Let Triton bind each launch; raises what it raises, and what its compiler does if it `compiles`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from qvl_kernels.triton.launch import Launch

    bound, target = Bound(), GPUTarget(BACKEND, capability, WARP)
    cached: list[Any] = []  # functions that keep binaries of this target

    class Driver:
        """The driver of the only GPU."""

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_once(
        function: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> Any:
        source = function.ASTSource(function, signature, constants, attributes)
        name = function.fn.__name__
        bound.sources[name, str(key)] = {function.arg_names[path[0]]: value for path, value in constants.items()}
        if compiles:
            compiled = triton.compile(source, target=target, options=options.__dict__)
            bound.needs[name, str(key)] = Needs(compiled.metadata.shared, stack_of(compiled.asm["cubin"]))
        function.device_caches[device][0][key] = made = Binary(name, str(key), bound.used)
        cached.append(function)
        return made

    def run(launch: Launch) -> None:
        if not all(launch.grid):
            return
        arguments: dict[str, Any] = {k: Pointer(v) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and value.device.type != "cuda":
                raise ValueError(f"Pointer argument {name!r} cannot be accessed from Triton (cpu tensor?)")
        with _disable_current_modes():
            original(launch.with_arguments(**arguments))
        bound.launch(launch.kernel.fn.__name__)

    original = Launch.run
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "_do_compile", compile_once))
        stack.enter_context(patch.object(Launch, "run", run))
        triton.runtime.driver.set_active(Driver())
        try:
            yield bound
        finally:
            for function in cached:
                function.device_caches.clear()
