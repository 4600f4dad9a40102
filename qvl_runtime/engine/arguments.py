"""The arguments of `Engine`'s methods: one prompt or several, and sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvl_runtime.errors import PromptError, SamplingError, quoted
from qvl_runtime.prompt.chatml import Prompt
from qvl_runtime.schedule.api import SamplingParams


def checked_params(params: SamplingParams | None) -> SamplingParams:
    """Return sampling parameters, by default those of the checkpoint. Raises `SamplingError` for anything else."""
    if params is not None and not isinstance(params, SamplingParams):
        raise SamplingError(f"params is {quoted(params)}; expected SamplingParams, as SamplingParams(temperature=0)")
    return params or SamplingParams()


def checked_list(name: str, values: object, of: str) -> list[Any]:
    """Return values as a list. Raises `PromptError` for anything but a sequence, and for a string."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise PromptError(f"{name} is {quoted(values)}; expected a list of {of}")
    return list(values)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list; a string or dict alone is one prompt.

    Raises `PromptError` for the parts of one prompt that are not in a list of their own, and for no list at all.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray)):
        raise PromptError(f"prompts is {quoted(prompts)}; expected a prompt, such as a string, or a list of them")
    listed = list(prompts)
    bare = [p for p in listed if isinstance(p, Mapping) and "token_ids" not in p]
    if bare:
        raise PromptError(
            f"generate takes a list of prompts, and its first dict has {', '.join(map(repr, bare[0]))}: put the "
            "parts or messages of one prompt into a list of their own, generate([[...]]), or use chat(messages)"
        )
    return listed
