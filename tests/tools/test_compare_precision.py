"""What a precision costs, on nano: nothing against itself, more where more is rounded."""

from __future__ import annotations

import pytest
import torch

from qvl_runtime.engine.engine import NANO
from tools.compare_precision import compare, loss

pytestmark = pytest.mark.cpu


def test_more_rounding_costs_more() -> None:
    found = compare(NANO, count=4, tokens=8)
    assert {said.tokens for said in found.values()} == {32}
    exact, fast = found["float16, exact"], found["bfloat16, fast"]
    assert 0 < exact.error < found["bfloat16, exact"].error < fast.error < 0.1
    assert 0 <= exact.kl < fast.kl and 0.5 < fast.agreement <= 1


def test_the_loss_of_known_logits() -> None:
    right = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    nothing = loss([right], [right])
    assert (nothing.error, nothing.kl, nothing.agreement, nothing.tokens) == (0, 0, 1, 2)
    turned = loss([right], [-right])
    assert turned.agreement == 0
    # p is (0.1192, 0.8808) in one order or the other, and the logarithms differ by 2 either way
    assert turned.kl == pytest.approx(2 * (0.880797 - 0.119203), abs=1e-5)
    assert turned.error == pytest.approx(6**0.5)  # squares 0, 16, 4 and 4, over a variance of 1
