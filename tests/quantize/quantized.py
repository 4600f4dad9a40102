"""Quantizing the small float checkpoint of `conftest.source`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer

FEW = QuantizeOptions(samples=8, group_size=32)


def run(source: Path, target: Path, options: QuantizeOptions = FEW, **more: Any) -> Quantizer:
    quantizer = Quantizer.open(source, target, options, **more)
    quantizer.run()
    return quantizer


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
