"""What we quantize, run by AutoGPTQ's own torch modules: another's reading of the layout gives the same outputs.

They are looked for, never imported as a package (that wants transformers): `pip install --no-deps auto-gptq==0.7.1`, or
into a folder that PYTHONPATH names.
"""

from __future__ import annotations

import importlib.util
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qvl_kernels.reference import gptq_linear
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.quantize.solver import Solver
from tests.quantize.test_solver import inputs, weights

pytestmark = pytest.mark.unit
if importlib.util.find_spec("auto_gptq") is None:
    pytest.skip("auto-gptq is not installed: pip install --no-deps auto-gptq==0.7.1", allow_module_level=True)
WIDTH = 256


def quant_linear(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """AutoGPTQ's class of that file, without the rest of its package."""
    found = importlib.util.find_spec("auto_gptq")
    if found is None or found.origin is None:
        pytest.skip("auto-gptq is not installed: pip install --no-deps auto-gptq==0.7.1")
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))  # only its packer uses it
    path = Path(found.origin).parent / "nn_modules" / "qlinear" / f"{kind}.py"
    spec = importlib.util.spec_from_file_location(f"auto_gptq_{kind}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


@pytest.mark.parametrize(
    ("kind", "bits", "group", "sym", "order"),
    [
        *product(("qlinear_cuda_old", "qlinear_cuda"), (4, 8), (32, 128, -1), (True, False), ("static",)),
        *product(("qlinear_cuda",), (4,), (32, 128), (True, False), ("full",)),
    ],
)
def test_autogptq_gives_the_same_outputs(
    kind: str, bits: int, group: int, sym: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = Solver(QuantizationConfig(bits, group, desc_act=order == "full", sym=sym), order=order)
    x, bias = inputs(600, WIDTH), torch.linspace(-1, 1, 64)
    linear = solver.solve(weights(WIDTH), solver.factor(x), bias)
    theirs = quant_linear(kind, monkeypatch)(bits, group, WIDTH, 64, True, weight_dtype=torch.float32)
    missing, unexpected = theirs.load_state_dict(
        {key.removeprefix("l."): value for key, value in linear.tensors("l").items()}, strict=False
    )
    assert (missing, unexpected) == ([], [])
    theirs.scales, theirs.bias = theirs.scales.float(), theirs.bias.float()  # half precision is not for this CPU path
    rows = x[:5]
    ours = gptq_linear(
        rows, linear.qweight, linear.qzeros, linear.scales, linear.g_idx, bits, linear.zero_offset, bias.half().float()
    )
    with torch.inference_mode():
        found = theirs(rows)
    bound = WIDTH * torch.finfo(torch.float32).eps * (rows.abs() @ weights(WIDTH).abs().t() + bias.abs())
    assert ((found - ours).abs() <= bound).all()
