"""Conversations to keep: the divergence and its gradient, and that they hold a model where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl_runtime.errors import DownloadError, ImageError
from qvl_runtime.finetune.keeping import BYTES, REMEMBERED, Predictions, predictions
from qvl_runtime.finetune.loss import divergence_sum
from qvl_runtime.finetune.packing import row_of
from qvl_runtime.finetune.run import Finetuning
from qvl_runtime.finetune.trainer import Trainer
from tests.finetune.small import learner, sample
from tests.finetune.test_trainer import QUICK, StopError, data, stop_after, weights

__all__ = ["data"]
pytestmark = pytest.mark.cpu


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(logits: Tensor, before: Tensor, kept: Predictions) -> Tensor:
    """Kullback and Leibler's sum over the remembered tokens and one outcome for all others."""
    remembered = torch.zeros_like(before, dtype=torch.bool).scatter(1, kept.ids.long(), True)
    pairs = []
    for scores in (before, logits):
        shares = scores.softmax(-1)
        others = shares.masked_fill(remembered, 0).sum(-1, keepdim=True)
        pairs.append(torch.cat([shares.gather(1, kept.ids.long()), others], -1))
    p, q = pairs
    return torch.xlogy(p, p / q.clamp_min(1e-300)).sum()


@pytest.mark.parametrize("vocabulary", [11, REMEMBERED, REMEMBERED + 1, 300])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_divergence_and_its_gradient_are_autograds(vocabulary: int, rows: int) -> None:
    head, before, hidden = normal(1, vocabulary, 5), normal(2, 7, 5), normal(3, 7, 5)
    kept = predictions(before, head, rows)
    assert kept.ids.shape == (7, min(vocabulary, REMEMBERED))
    if vocabulary >= REMEMBERED:
        assert sum(tensor.nbytes for tensor in kept) == 7 * BYTES
    torch.testing.assert_close(kept.shares.sum(-1, keepdim=True) + kept.others, torch.ones(7, 1))
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = divergence_sum(h, w, kept, rows) if ours else divergence(h @ w.t(), before @ head.t(), kept)
        (loss * 0.3).backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None and w.grad is not None
        results.append((loss.detach(), h.grad, w.grad))
    for ours_, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours_, torchs, rtol=1e-5, atol=1e-6)  # what is kept is float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_pulls_before_the_model_has_moved(source: Path, dtype: str) -> None:
    one = learner(source, dtype=dtype, method="full")
    samples = [sample(one.network.c, 1), replace(sample(one.network.c, 2), keep=True)]
    one.remember(samples)
    learned, kept = samples
    assert learned.kept is None and kept.kept is not None and len(kept.kept.ids) == kept.num_targets
    losses = one.losses([kept])
    assert float(losses.learned.detach()) == 0 and float(losses.kept.detach()) == pytest.approx(0, abs=1e-3)
    losses.kept.backward()  # type: ignore[no-untyped-call]
    for parameter in one.network.parameters():
        if parameter.grad is not None:
            assert float(parameter.grad.norm()) < (1e-4 if dtype == "float32" else 1e-1)
    both = one.losses(samples)
    assert float(both.learned.detach()) == pytest.approx(
        float(one.loss_sum([learned]).detach()), rel=1e-5 if dtype == "float32" else 0.05
    )


def test_a_row_tells_what_is_learned_from_what_is_kept(source: Path) -> None:
    one = learner(source)
    samples = [replace(sample(one.network.c, 1), keep=True), sample(one.network.c, 2), sample(one.network.c, 3, 20)]
    one.remember(samples)
    row, plain = row_of(samples), row_of([replace(each, keep=False) for each in samples])
    first = samples[0].num_targets
    assert row.keeping.tolist() == plain.predicting.tolist()[:first] and row.kept is not None
    assert row.predicting.tolist() == plain.predicting.tolist()[first:]
    assert row.targets.tolist() == plain.targets.tolist()[first:]


@pytest.mark.parametrize("error", [ImageError, DownloadError])
def test_an_image_that_cannot_be_read_leaves_nothing_to_keep(
    error: type[Exception], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = learner(source)
    gone, there = (replace(sample(one.network.c, seed), keep=True) for seed in (1, 2))
    read, seen = one.features._load, list[None]()

    def load(image: Any) -> Any:
        if image is gone.images[0].source:
            raise error("gone")
        return read(image)

    monkeypatch.setattr(one.features, "_load", load)
    samples = [gone, there]
    one.remember(samples, lambda: seen.append(None))
    assert samples[0] is gone and samples[1].kept is not None and len(seen) == 2
    monkeypatch.setattr("qvl_runtime.finetune.learner.is_sharded", lambda parameter: True)
    with pytest.raises(error):  # the other processes would wait
        one.remember([gone])


def divided(data: Path) -> tuple[Path, Path]:
    """The data's records as two files: two to learn, four to keep."""
    records = json.loads(data.read_text())
    for name, part in (("learn", records[:2]), ("keep", records[2:])):
        data.with_name(f"{name}.json").write_text(json.dumps(part))
    return data.with_name("learn.json"), data.with_name("keep.json")


def test_what_is_kept_stays_near_and_a_resumed_run_is_the_same(source: Path, data: Path, tmp_path: Path) -> None:
    learn, keep = divided(data)

    def job(out: str, weight: float) -> Finetuning:
        options = replace(QUICK, epochs=6, keep_weight=weight)
        return Finetuning.open(source, learn, tmp_path / out, options, keep=keep)

    held, free = job("held", 4.0).run(), job("free", 1e-9).run()
    kept, loose = ([entry["divergence"] for entry in run if "divergence" in entry] for run in (held, free))
    assert "divergence" not in held[0] or kept[0] == pytest.approx(0, abs=1e-4), "the first step is the base itself"
    assert kept[-1] < loose[-1] / 4
    learned = [entry["loss"] for entry in held if entry["loss"] is not None]  # some steps keep alone
    assert learned[-1] < learned[0]
    with pytest.raises(StopError):
        job("parts", 4.0).run(progress=stop_after(7))
    job("parts", 4.0).run()
    assert weights(tmp_path / "parts") == weights(tmp_path / "held")


@pytest.mark.parametrize("mean", ["token", "batch"])
def test_an_image_that_comes_back_changes_neither_a_run_nor_its_resume(
    mean: Any, source: Path, data: Path, tmp_path: Path
) -> None:
    learn, keep = divided(data)
    image, options = tmp_path / "3.png", replace(QUICK, mean=mean, accumulate=1)
    whole = image.read_bytes()

    def job(out: str) -> Finetuning:
        return Finetuning.open(source, learn, tmp_path / out, options, keep=keep)

    def come_back(trainer: Trainer) -> None:
        assert len(trainer.left_out) == 1
        image.write_bytes(whole)

    runs = [job(out) for out in ("whole", "parts")]
    image.write_bytes(b"not there for a moment")
    entries = runs[0].run(on_start=come_back)
    assert [entry["skipped"] for entry in entries][-1] == 2, "its turn comes once an epoch"
    assert sum(entry["norm"] is None for entry in entries) == 2
    image.write_bytes(b"not there for a moment")
    with pytest.raises(StopError):
        runs[1].run(on_start=come_back, progress=stop_after(7))
    resumed: list[int] = []
    job("parts").run(on_start=lambda trainer: resumed.extend(trainer.left_out))
    assert len(resumed) == 1 and weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_other_conversations_to_keep_are_another_run(source: Path, data: Path, tmp_path: Path) -> None:
    learn, keep = divided(data)
    keys: list[Any] = [
        Finetuning.open(source, learn, tmp_path / "out", options, keep=kept).key()
        for options, kept in ((QUICK, keep), (QUICK, None), (QUICK, learn), (replace(QUICK, keep_weight=2.0), keep))
    ]
    assert all(keys.count(key) == 1 for key in keys)
    assert "keep_weight" not in keys[1], "states of before there was one resume"
