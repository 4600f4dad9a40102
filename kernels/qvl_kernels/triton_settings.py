"""Settings of the GPU kernels in the environment that are checked before anything is loaded; imports no Triton."""

from __future__ import annotations

import os
import re

# Rows of an int4 weight whose tiles are dequantized in registers for wgmma, instead of on their way through shared
# memory. By the kernel report, not measured; QVL_INT4_WGMMA names others, "65-4095", or "0": none.
WGMMA_M = (33, 1023)


def asked_wgmma_rows() -> tuple[int, int]:
    """First and last number of rows for wgmma; raises `ValueError` if QVL_INT4_WGMMA names no such range."""
    asked = os.environ.get("QVL_INT4_WGMMA")
    if not asked:
        return WGMMA_M
    if asked == "0":
        return 1, 0
    found = re.fullmatch(r"(\d{1,6})-(\d{1,6})", asked)
    if found is None:
        raise ValueError(f"QVL_INT4_WGMMA is {asked[:40]!r}; expected rows such as '33-1023', or '0' for none")
    return int(found[1]), int(found[2])
