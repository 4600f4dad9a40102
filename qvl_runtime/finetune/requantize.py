"""Merge an adapter onto an Int4 checkpoint: dequantize, add, and quantize the sum again, with the KL that it costs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.merge import write_float
from qvl_runtime.finetune.probe import Distance, answer_logits, distance, probe_samples
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from qvl_runtime.weights.adapter import read_adapter
from qvl_runtime.weights.partial import check_destination


class Requantized(NamedTuple):
    """How far two models are from the Int4 checkpoint with the adapter next to it."""

    without: Distance  # the checkpoint without the adapter: what the adapter is worth
    requantized: Distance  # the result


def requantize(
    source: Path,
    adapter_folder: Path,
    destination: Path,
    calibration: Path | None,
    samples: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Requantized:
    """Write `source` with an adapter merged and quantized again, in the settings of `source`, as `destination`.

    calibration: a fine-tuning file, best the one that the adapter was trained on; None: built-in conversations. The
    float sum is in `.NAME.float-…` meanwhile, and a stopped quantization resumes. Raises `ConfigError` for a checkpoint
    that is not quantized.
    """
    source, destination = Path(source), Path(destination)
    check_destination(source, destination)
    config = ModelConfig.from_folder(source)
    quantization = config.quantization
    if quantization is None:
        raise ConfigError(f"{source} is not quantized: merge without --requantize, which loses nothing")
    adapter = read_adapter(adapter_folder, config)
    probe = probe_samples(source, calibration)
    place = str(device)
    reference = answer_logits(source, probe, adapter, place)
    without = distance(reference, answer_logits(source, probe, None, place))
    options = QuantizeOptions(
        bits=quantization.bits,
        group_size=quantization.group_size,
        sym=quantization.sym is not False,
        order="full" if quantization.desc_act else "static",
        samples=samples,
    )
    sums = hashlib.sha256(repr([(name, s.a.sum(), s.b.sum()) for name, s in adapter.sides.items()]).encode())
    floats = destination.with_name(f".{destination.name}.float-{sums.hexdigest()[:8]}")
    if not floats.exists():
        write_float(source, adapter, floats)
    Quantizer.open(floats, destination, options, calibration, device).run(progress)
    shutil.rmtree(floats)
    return Requantized(without, distance(reference, answer_logits(destination, probe, None, place)))
