"""CUDA graphs without CUDA: what is captured is run again, and must then do the same to the same tensors.

Like a graph, a replay sees static buffers only: what the function makes of values that it closed over, or of shapes
that changed, would differ from what was captured, and is refused. Like a graph, it gives its result where the captured
run put it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qvl_runtime.schedule.decode_graphs import Captured

OPS = ("linear", "rms_norm", "add_rms_norm", "swiglu", "rotary_attention")
STATIC = ("k_cache", "v_cache", "block_tables", "query_starts", "context_lens", "slots", "weight")


class Call(NamedTuple):
    """An op, and for each tensor that it was given its shape and dtype, and the address of those that must not move."""

    op: str
    tensors: tuple[tuple[Any, ...], ...]


class FakeCapture:
    """A `Capture` that watches the ops of a module, or the launches of Triton's, while a captured function runs."""

    def __init__(self, ops: ModuleType, patch: pytest.MonkeyPatch) -> None:
        self.captured: list[list[Call]] = []
        self.nbytes = None
        self._calls: list[Call] | None = None
        if ops.__name__ == "qvl_kernels.triton":  # what its ops do around their launches must fit a graph too
            self._watch_launches(patch)
            return
        for name in OPS:
            patch.setattr(ops, name, self._watched(name, getattr(ops, name)))

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        calls, output = self._run(function)
        self.captured.append(calls)

        def replay() -> None:
            again, made = self._run(function)
            assert again == calls, next(f"{a}, captured as {c}" for a, c in zip(again, calls, strict=True) if a != c)
            assert made.shape == output.shape and made.dtype == output.dtype
            with torch.inference_mode():
                output.copy_(made)

        return Captured(replay, output)

    def _run(self, function: Callable[[], Tensor]) -> tuple[list[Call], Tensor]:
        self._calls = calls = []  # type: ignore[var-annotated]
        try:
            with no_values_read():
                return calls, function()
        finally:
            self._calls = None

    def _watch_launches(self, patch: pytest.MonkeyPatch) -> None:
        from qvl_kernels.triton.launch import Launch

        original = Launch.run

        def run(launch: Launch) -> None:
            if self._calls is not None:
                given = {**launch.arguments, **launch.constants, "grid": launch.grid}
                self._calls.append(
                    Call(
                        launch.kernel.__name__,
                        tuple(
                            (key, value.shape, value.dtype) if isinstance(value, Tensor) else (key, value)
                            for key, value in given.items()
                        ),
                    )
                )
            with values_may_be_read():
                original(launch)

        patch.setattr(Launch, "run", run)

    def _watched(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        import inspect

        names = list(inspect.signature(op).parameters)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._calls is None:
                return op(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            for key in ("query_starts", "context_lens"):
                assert key not in given or isinstance(given[key], Tensor), f"{name}: {key} would be frozen in a graph"
            self._calls.append(
                Call(
                    name,
                    tuple(
                        (key, value.shape, value.dtype, value.data_ptr() if key in STATIC else None)
                        for key, value in given.items()
                        if isinstance(value, Tensor)
                    ),
                )
            )
            with values_may_be_read():
                return op(*args, **kwargs)

        return watched


class _Reads(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a CUDA graph cannot hold: reading a value back, and tensors made of numbers of the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert name not in self.FORBIDDEN and not by_mask, f"a captured step calls {name}: no CUDA graph holds that"
        return func(*args, **(kwargs or {}))


def no_values_read() -> AbstractContextManager[Any]:
    return _Reads()  # type: ignore[no-untyped-call]


def values_may_be_read() -> AbstractContextManager[Any]:
    """For the insides of reference ops, which do on the host what a kernel does on the device."""
    return torch.utils._python_dispatch._disable_current_modes()
