"""A self-contained inference runtime for Qwen-VL, Qwen-VL-Chat and Qwen-VL-Chat-Int4.

    from qvl_runtime import Engine, SamplingParams

The names below are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_runtime.engine.async_engine import AsyncEngine as AsyncEngine
    from qvl_runtime.engine.engine import Engine as Engine
    from qvl_runtime.engine.score import Score as Score
    from qvl_runtime.errors import QVLError as QVLError
    from qvl_runtime.prompt.boxes import Box as Box
    from qvl_runtime.prompt.images import load_image as load_image
    from qvl_runtime.schedule.api import Completion as Completion
    from qvl_runtime.schedule.api import SamplingParams as SamplingParams
    from qvl_runtime.schedule.api import StreamPiece as StreamPiece

__version__ = "0.1.0"

_MODULES = {
    "AsyncEngine": "qvl_runtime.engine.async_engine",
    "Engine": "qvl_runtime.engine.engine",
    "Score": "qvl_runtime.engine.score",
    "QVLError": "qvl_runtime.errors",
    "Box": "qvl_runtime.prompt.boxes",
    "load_image": "qvl_runtime.prompt.images",
    "Completion": "qvl_runtime.schedule.api",
    "SamplingParams": "qvl_runtime.schedule.api",
    "StreamPiece": "qvl_runtime.schedule.api",
}

__all__ = [*sorted(_MODULES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
