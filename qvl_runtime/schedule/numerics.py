"""Say why a row of logits gives no next token."""

from __future__ import annotations

from torch import Tensor

from qvl_kernels.util import dtype_name
from qvl_runtime.errors import NumericsError, RuledOutError


def numerics_error(logits: Tensor, penalty: float = 1.0, bias: Tensor | None = None) -> NumericsError:
    """Return the error of a row of logits [vocab] without a distribution, alone or after a penalty and biases [vocab].

    It names the likely cause: the logits themselves, biases that rule out every token, or scores beyond float32.
    """
    raw = logits.float()
    nan = int(raw.isnan().sum())
    infinite = len(raw) if bool(raw.isneginf().all()) else int(raw.isposinf().sum())
    if nan or infinite:
        return _of_the_model(nan, infinite, len(raw), dtype_name(logits.dtype))
    if bias is not None and bool((raw + bias).isneginf().all()):
        return RuledOutError(f"logit_bias forbids every token of {len(raw)}: leave one without -inf")
    return RuledOutError(
        f"repetition_penalty {penalty:g} and logit_bias give a token an infinite score: use values nearer to 1 and 0"
    )


def _of_the_model(nan: int, infinite: int, count: int, dtype: str) -> NumericsError:
    found = " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
    cause, way_out = "a damaged weight", "fetch the checkpoint again"
    if dtype == "float16":
        cause = f"a value beyond float16's 65,504, or {cause}"
        way_out = f"use the dtype bfloat16 or float32, or {way_out}"
    return NumericsError(
        f"the model gives no next token: {found} of its {count} logits in {dtype}. The likely cause is {cause}: "
        f"{way_out}"
    )
