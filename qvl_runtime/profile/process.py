"""Measure the memory of the process without its model, and the memory bandwidth of this CPU."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from qvl_runtime.engine.engine import NANO, Engine
from qvl_runtime.engine.estimate import generated_code_bytes
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.host import resident_memory
from qvl_runtime.prompt.tokenizer import VOCABULARY_FILE, Tokenizer
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.weights.loader import model_config
from qvl_runtime.weights.manifest import is_converted
from qvl_runtime.weights.synthetic import synthetic_config

READ_BYTES = 256 << 20  # more than any cache holds
READ_SECONDS = 0.25


def process_bytes(folder: Path, dtype: str = "auto", synthetic: str | None = None) -> int:
    """Bytes that a process holds in addition to a folder's model once it has run; 0 if the OS does not report it.

    Measured by running a checkpoint that ships with the package once and releasing it. Importing torch alone shows
    30 of 250 MiB less, because code pages are read in when they are first called. The small checkpoint runs in the
    model's dtype, since float32 calls other GEMMs; its Int4 version runs if packed weights are repacked at load,
    which calls 8 MiB of torch code that nothing else does. Code generated for the shapes of the small model is
    subtracted, as every model has its own. The folder's tokenizer counts: the published one takes 59 MiB.

    synthetic: the name of the random weights that replace the folder's.
    """
    config, prepacked = model_config(folder), synthetic is None and is_converted(folder)
    if synthetic is not None:
        config = synthetic_config(synthetic, config)
    packs = config.quantization is not None and not prepacked
    engine = Engine(
        NANO.with_name("nano_int4") if packs else NANO,
        device="cpu",
        dtype=config.dtype if dtype == "auto" else dtype,
        precision="fast" if packs else "exact",
        max_model_len=1024,
        kv_cache_bytes=8 << 20,
    )
    generated_code = _answer_once(engine)
    del engine
    tokenizer = Tokenizer.from_folder(folder) if (folder / VOCABULARY_FILE).is_file() else None
    gc.collect()
    trim_heap()
    resident = resident_memory()
    del tokenizer
    return max(0, resident - generated_code)


def _answer_once(engine: Engine) -> int:
    """Run a short request with one image; returns the bytes of code that it made oneDNN generate."""
    import numpy as np

    encoded = engine.encode([{"image": np.zeros((32, 32, 3), np.uint8)}, {"text": "What is it?"}])
    request = engine.submit(encoded, SamplingParams(max_tokens=4, temperature=0))
    while not request.done:
        engine.core.step()
    return generated_code_bytes(engine, len(encoded.prompt.token_ids), images=1)


def read_bandwidth() -> float:
    """The best memory read bandwidth of this CPU, bytes per second, over 0.25 s after a warm-up pass."""
    from qvl_kernels.bandwidth import reader

    read, nbytes, _ = reader(torch.device("cpu"), READ_BYTES)
    read()
    best, end = 0.0, time.perf_counter() + READ_SECONDS
    while (began := time.perf_counter()) < end:
        read()
        best = max(best, nbytes / (time.perf_counter() - began))
    return best
