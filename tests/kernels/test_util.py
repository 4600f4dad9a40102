"""The helpers that every package shares."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qvl_kernels.util import cdiv, dtype_name

pytestmark = pytest.mark.unit


def test_cdiv_rounds_up_and_is_exact_beyond_floats() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert cdiv(2**62 + 1, 2) == 2**61 + 1


def test_dtype_names_are_without_torch() -> None:
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float32, torch.int8)] == [
        "bfloat16",
        "float32",
        "int8",
    ]


def test_helpers_import_no_torch() -> None:
    code = "import sys, qvl_kernels.util, qvl_kernels.gpus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
