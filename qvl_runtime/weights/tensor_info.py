"""What is known of a stored tensor without reading it, and the error of a file that cannot be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.errors import CheckpointError


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor; the dtype as torch spells it without the prefix, such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 for a dtype that torch does not have."""
        import torch

        dtype = getattr(torch, self.dtype, None)
        return 0 if dtype is None else math.prod(self.shape) * int(dtype.itemsize)


def damaged(path: Path, cause: object) -> CheckpointError:
    """The error of a file that is not whole; cause: what its reader said."""
    lines = str(cause).strip().splitlines()
    detail = lines[0] if lines else type(cause).__name__
    return CheckpointError(
        f"{path} is damaged or truncated at {path.stat().st_size} bytes ({detail}): fetch the file again"
    )
