"""Checkpoints and engines that the tests of scheduling share."""

from __future__ import annotations

from pathlib import Path

from qvl_runtime import Engine


def checkpoint(name: str, golden: Path) -> Path:
    return Path(__file__).parents[2] / "qvl_runtime" / name if name.startswith("nano") else golden / name


def engine_of(folder: Path, context: int = 4096, **options: object) -> Engine:
    """In float32; `kv_tokens` is the cache's size as a share of a context."""
    share = options.pop("kv_tokens", None)
    if share is not None:
        per_token = Engine(folder, dtype="float32", max_model_len=64, **options).report()["memory"]["kv_per_token"]
        options["kv_cache_bytes"] = int(share * context) * per_token  # type: ignore[operator]
    return Engine(folder, dtype="float32", max_model_len=context, **options)
