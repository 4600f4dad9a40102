"""Sampling by a kernel gives what sampling in torch gives, and marks what it chose."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from qvl_kernels import reference
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.sampler import sample
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make setup"),
]
VOCAB = 97


def rows(*asked: SamplingParams) -> list[SamplingRow]:
    return [
        SamplingRow(SamplingState(params, (3, 5, 8), VOCAB, torch.device("cpu")), i) for i, params in enumerate(asked)
    ]


def params(**given: Any) -> SamplingParams:
    plain: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 11}
    return SamplingParams(**plain | given)


GREEDY = (params(), params(logprobs=2))
MIXED = (
    params(),
    params(temperature=0.7),
    params(temperature=1.0, top_p=0.5),
    params(temperature=1.3, top_k=5),
    params(repetition_penalty=1.4),
    params(temperature=0.9, logit_bias={7: 4.0}, logprobs=3),
    params(temperature=1.0, repetition_penalty=1.2, min_p=0.1),
)


@pytest.mark.parametrize("asked", [GREEDY, MIXED, MIXED[:4]], ids=["greedy", "mixed", "no penalty, no bias"])
def test_as_in_torch(asked: tuple[SamplingParams, ...]) -> None:
    from qvl_kernels import triton

    logits = 3 * torch.randn(len(asked), VOCAB, generator=torch.Generator().manual_seed(1))
    ours, plain = rows(*asked), rows(*asked)
    for _ in range(2):  # the second time, what was chosen the first is punished
        got, want = sample(logits, ours, triton), sample(logits, plain)
        assert [s.token_id for s in got] == [s.token_id for s in want]
        for mine, other in zip(got, want, strict=True):
            assert mine.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
            assert [token for token, _ in mine.logprob.top] == [token for token, _ in other.logprob.top]
    for mine, other in zip(ours, plain, strict=True):  # type: ignore[assignment]
        assert (mine.state.seen is None) == (other.state.seen is None)  # type: ignore[attr-defined]
        assert mine.state.seen is None or torch.equal(mine.state.seen, other.state.seen)  # type: ignore[attr-defined]


def test_ops_without_a_kernel_sample_in_torch() -> None:
    """All rows greedy: in one pass, by the op; else as the torch sampler does."""
    logits = torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(2))
    for asked in (MIXED, (params(),) * len(MIXED)):
        got, want = sample(logits, rows(*asked), reference), sample(logits, rows(*asked))
        assert [s.token_id for s in got] == [s.token_id for s in want]
        for mine, other in zip(got, want, strict=True):
            assert mine.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
