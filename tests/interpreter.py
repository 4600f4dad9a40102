"""Triton's interpreter, made quicker: by default a third of its time goes into patching its own language.

It replaces what `triton.language` does by numpy when a kernel is launched, and again in every call of a device function
within, of which `tl.sum` is one. Once a launch is enough. Measured in seconds of CPU for 8 rows of the oracle's tiny
models: 1.85 to 1.2 in float16, 3.6 to 2.2 in Int4; a program of the rotary kernel takes 21 ms instead of 32.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import pytest


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """To the same results: only what this launch has patched already is left out."""
    from triton.runtime import interpreter

    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()  # language modules, since the launch began

    @cache
    def seen_by(function: FunctionType) -> frozenset[str]:
        languages = (interpreter.tl, interpreter.tl.core)
        return frozenset(it.__name__ for it in languages if any(it is value for value in function.__globals__.values()))

    def patch_once(function: FunctionType) -> Any:
        if seen_by(function) <= patched:
            return None
        patched.update(seen_by(function))
        return patch_language(function)

    def launch_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # as what a launch patched is restored at its end
        return launch(self, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_fresh)


def dot_in_one_order(patch: pytest.MonkeyPatch) -> None:
    """Round each product of matrices once, from float64: numpy's BLAS adds up in an order that depends on the shape.

    On some CPUs a column of a product has other last bits if fewer columns are computed with it (Zen 3, OpenBLAS), so
    that kernels which tile a linear differently could not be compared bit for bit.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
