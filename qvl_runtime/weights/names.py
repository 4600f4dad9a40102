"""The published names of tensors that a trainer or wrapper stored under longer ones.

DataParallel puts `module.` in front of every name, PEFT `base_model.model.`, torch.compile `_orig_mod.`, Lightning the
attribute that holds the model; FSDP and activation checkpointing put theirs in the middle; a decoder that was saved
alone lacks `transformer.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qvl_runtime.errors import CheckpointError, quoted

_EMBEDDING = "wte.weight"  # every checkpoint has it, at the end of one name
_ROOT = "transformer."
_HEAD = "lm_head."
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # parts of no published name


class Names(NamedTuple):
    """The stored name of each tensor, by its published one, and what was left out or added."""

    stored: dict[str, str]
    note: str  # empty if the names are as published


def published_names(stored: Iterable[str]) -> Names:
    """Find the published names of a checkpoint's tensors.

    Names stay as they are where no renaming makes them published ones: `Checkpoint.check` names them then. Raises
    `CheckpointError` for several copies of the model under different names.
    """
    listed = list(stored)
    names = {name: _unwrapped(name) for name in listed}
    wrapped = [part for part in _WRAPPERS if any(part in name for name in listed)]
    ends = [name for name in names.values() if name == _EMBEDDING or name.endswith(f".{_EMBEDDING}")]
    if len(ends) > 1:
        raise CheckpointError(
            f"the checkpoint holds the model {len(ends)} times, with the embeddings "
            f"{', '.join(map(quoted, ends[:3]))}: save the one to run alone"
        )
    prefix = ends[0].removesuffix(_EMBEDDING) if ends else _ROOT
    rootless = not prefix.endswith(_ROOT)
    prefix = prefix if rootless else prefix.removesuffix(_ROOT)
    if prefix and not all(name.startswith(prefix) for name in names.values()):
        return Names({name: name for name in listed}, "")
    names = {name: _rooted(short.removeprefix(prefix), rootless) for name, short in names.items()}
    if len(set(names.values())) < len(names):
        return Names({name: name for name in listed}, "")
    changes = [f"{quoted(part)} is left out" for part in (prefix, *wrapped) if part]
    changes += [f"{quoted(_ROOT)} is put in front"] if ends and rootless else []
    note = f"the names of the weights are not the published ones: {', '.join(changes)}" if changes else ""
    return Names({short: name for name, short in names.items()}, note)


def common_prefix_hint(unexpected: Iterable[str]) -> str:
    """What to do about names of which only some have a prefix; empty if none has."""
    names = list(unexpected)
    inside = next((name for name in names if f".{_ROOT}" in name), None)
    if inside is None:
        return ""
    prefix = inside[: inside.index(f".{_ROOT}") + 1]
    count = sum(name.startswith(prefix) for name in names)
    return f": {count} names begin with {quoted(prefix)} and others do not: save the weights of the model alone"


def _unwrapped(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _rooted(name: str, rootless: bool) -> str:
    return f"{_ROOT}{name}" if rootless and not name.startswith(_HEAD) else name
