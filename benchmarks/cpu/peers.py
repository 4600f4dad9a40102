"""Int4 linears of ONNX Runtime and OpenVINO, where they are installed, to time next to ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

GROUP = 128  # inputs that share a scale
Calls = dict[str, Callable[[], object]]


def onnxruntime_linears(shapes: list[tuple[int, int]], rows: int) -> Calls:
    """MatMulNBits at accuracy level 4 (int8 activations), all shapes in one session; empty if it is not installed."""
    try:
        import numpy as np
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    rng, nodes, held, outs, feeds = np.random.default_rng(0), [], [], [], {}
    for n, (inputs, outputs) in enumerate(shapes):
        packed = rng.integers(0, 256, (outputs, inputs // GROUP, GROUP // 2), dtype=np.uint8)
        scales = np.full(outputs * inputs // GROUP, 0.002, np.float32)
        held += [numpy_helper.from_array(packed, f"w{n}"), numpy_helper.from_array(scales, f"s{n}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [f"x{inputs}", f"w{n}", f"s{n}"],
                [f"y{n}"],
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=4,
                block_size=GROUP,
                accuracy_level=4,
            )
        )
        outs.append(helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, [rows, outputs]))
        feeds[f"x{inputs}"] = rng.standard_normal((rows, inputs)).astype(np.float32)
    ins = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape)) for name, value in feeds.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "linears", ins, outs, held), opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {f"onnxruntime {onnxruntime.__version__} (onnx {onnx.__version__})": lambda: session.run(None, feeds)}


def openvino_linears(shapes: list[tuple[int, int]], rows: int) -> Calls:
    """Compressed int4 weights with OpenVINO's default dynamic quantization; empty if it is not installed."""
    try:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as op
    except ImportError:
        return {}
    rng, results, held = np.random.default_rng(0), [], []
    parameters: dict[int, Any] = {}
    for inputs, outputs in shapes:
        x = parameters.setdefault(inputs, op.parameter([rows, inputs], ov.Type.f32))
        groups = inputs // GROUP
        raw = rng.integers(0, 256, outputs * inputs // 2, dtype=np.uint8)
        zero_point = np.array([0x88], dtype=np.uint8)
        held += [raw, zero_point]  # openvino shares their memory
        values = ov.op.Constant(ov.Tensor(raw, ov.Shape([outputs, groups, GROUP]), ov.Type.u4))
        zero = ov.op.Constant(ov.Tensor(zero_point, ov.Shape([1, 1, 1]), ov.Type.u4))
        centered = op.subtract(op.convert(values, "f16"), op.convert(zero, "f16"))
        scaled = op.multiply(centered, op.constant(np.full((outputs, groups, 1), 0.002, np.float16)))
        weight = op.convert(op.reshape(scaled, op.constant(np.array([outputs, inputs])), False), "f32")
        results.append(op.matmul(x, weight, False, True))
    model = ov.Model(results, list(parameters.values()), "linears")
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    feeds = [rng.standard_normal((rows, inputs)).astype(np.float32) for inputs in parameters]

    def infer(feeds: list[Any], _shared: list[Any]) -> object:
        return request.infer(feeds)

    return {f"openvino {ov.__version__}": partial(infer, feeds, held)}
