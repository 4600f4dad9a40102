"""The sampling defaults of a checkpoint: `generation_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import read_fields, read_json, require_choice, require_positive
from qvl_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The content of `generation_config.json`; defaults are the released values, for a checkpoint without the file."""

    chat_format: str = "chatml"  # "raw" for the base model
    eos_token_id: int | None = None  # None: the tokenizer's <|endoftext|>
    pad_token_id: int | None = None
    max_window_size: int = 6144  # tokens of system text and history in a chat
    max_new_tokens: int = 512
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 0.5
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        require_choice("chat_format", self.chat_format, ("chatml", "raw"))
        require_positive(self, "", "max_window_size", "max_new_tokens", "repetition_penalty")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"generation_config.json has temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; "
                "expected temperature and top_k of at least 0 and top_p in (0, 1]"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read a folder's `generation_config.json`; without one, the released defaults."""
        path = Path(folder) / "generation_config.json"
        return cls.from_dict(read_json(path)) if path.is_file() else cls()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GenerationDefaults:
        """Read a `generation_config.json`, from which transformers omits values that equal its own defaults."""
        if raw.get("num_beams", 1) != 1:
            raise ConfigError(f"generation_config.json has num_beams {raw['num_beams']}; supported is 1")
        implied = {"do_sample": False, "top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
        present = {key: value for key, value in raw.items() if value is not None}
        for key in ("eos_token_id", "pad_token_id"):
            if isinstance(present.get(key), list) and len(present[key]) == 1:
                present[key] = present[key][0]
        return cls(**read_fields(cls, implied | present, "generation_config.json"))
