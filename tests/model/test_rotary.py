"""Rotary frequencies are kept, so they must not be those of a moment's default device."""

from __future__ import annotations

import pytest
import torch

from qvl_runtime.model.rotary import inverse_frequencies

pytestmark = pytest.mark.unit


def test_they_are_numbers_even_if_first_asked_for_on_meta() -> None:
    """As `qvl plan --finetune` does, which builds a network on torch's meta device."""
    with torch.device("meta"):
        found = inverse_frequencies(10007.0, 8, 1.0)  # a base that nothing else asks for
    assert found.device.type == "cpu"
    assert torch.allclose(found, 10007.0 ** (-torch.arange(4) / 4))
