"""How the linears of a GPTQ checkpoint are packed: `quantize_config.json`, or a section of `config.json`.

The writers spell the same settings differently: AutoGPTQ, Optimum and GPTQModel call the format `checkpoint_format`,
`format` or both, and numbers and truth values come as strings from converters of other projects. What the tensors
themselves say is compared with these labels where they are read: `formats.zero_points`, `weights.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qvl_runtime.config.checks import read_fields, require_choice
from qvl_runtime.errors import ConfigError, quoted

FORMATS = ("gptq", "gptq_v2")
GROUP_SIZES = (32, 64, 128, -1)
_SYNONYMS = {"quant_method": "method", "checkpoint_format": "format"}  # GPTQModel writes both, or the second alone
_FIELDS = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")
_REFUSED = {
    "lm_head": "which packs the head, too: quantize the float model again with lm_head false",
    "is_marlin_format": "a layout of one GPU kernel: take the checkpoint that it was converted from",
    "rotation": "which rotates the activations: quantize the float model again without it",
}
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How the five linears of each decoder block are stored: GPTQ, packed in int32 words."""

    bits: int
    group_size: int  # input channels that share a scale; -1: all of them
    desc_act: bool = False  # act-order: g_idx is a permutation, not i // group_size
    sym: bool | None = True  # None: the file does not say
    # "gptq" (v1): zero points stored minus one; "gptq_v2": stored as they are; None: two files disagree
    checkpoint_format: str | None = "gptq"
    dynamic: bool = False  # the file has rules for some linears; those that are packed must fit the fields above

    def __post_init__(self) -> None:
        require_choice("the checkpoint's bits", self.bits, (4, 8))
        require_choice("the checkpoint's group_size", self.group_size, GROUP_SIZES)
        if self.checkpoint_format is not None:
            require_choice("the checkpoint_format", self.checkpoint_format, FORMATS)

    @property
    def zero_offset(self) -> int:
        """The number added to a stored zero point: 1 for v1, 0 for v2."""
        return 1 if self.checkpoint_format == "gptq" else 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "quantize_config.json") -> QuantizationConfig:
        """Read AutoGPTQ's `quantize_config.json`, or the `quantization_config` section of `config.json`."""
        section = _normalized(raw, where)
        method = section.get("quant_method") or "gptq"
        if method != "gptq":
            raise ConfigError(
                f"{where} has quant_method {quoted(method)}; supported are 'gptq' and unquantized checkpoints"
            )
        for key, reason in _REFUSED.items():
            if section.get(key):
                raise ConfigError(f"{where} sets {key!r}, {reason}")
        dynamic = bool(section.pop("dynamic", None))
        values = read_fields(cls, section, where, skip=("dynamic",))
        return cls(**{"sym": None, **values, "dynamic": dynamic})

    @classmethod
    def from_files(cls, section: Mapping[str, Any] | None, file: Mapping[str, Any] | None) -> QuantizationConfig | None:
        """Read both places: the section of config.json counts, and quantize_config.json has what it lacks.

        None if there is neither. Where the two disagree on the format, as those of Optimum 2.3 do, the tensors tell.
        """
        if section is None:
            return None if file is None else cls.from_dict(file)
        ours, theirs = _normalized(section, "config.json"), _normalized(file or {}, "quantize_config.json")
        given = {key: value for key, value in ours.items() if value is not None}
        both = cls.from_dict({**theirs, **given}, "config.json")
        other = theirs.get("checkpoint_format")
        return replace(both, checkpoint_format=None) if other and other != both.checkpoint_format else both


def _normalized(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The section with one spelling of each key and value: strings of numbers and truth values become those."""
    section = dict(raw)
    for key, synonym in _SYNONYMS.items():
        other = section.pop(synonym, None)
        if section.get(key) is None:
            section[key] = other
        elif other is not None and _plain(other) != _plain(section[key]):
            raise ConfigError(
                f"{where} has {key} {quoted(section[key])} and {synonym} {quoted(other)}: correct the wrong one"
            )
    for key in (*_FIELDS, "quant_method", *_REFUSED):
        if key in section:
            section[key] = _plain(section[key])
    return section


def _plain(value: Any) -> Any:
    """A string that spells a whole number or a truth value as that, other strings in lower case; 4.0 as 4."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text.lstrip("-").isdecimal() and text.isascii() and len(text) < 10:
        return int(text)
    return _WORDS.get(text, text)
