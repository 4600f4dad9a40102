"""The trainable network: the engine's logits, gradients as finite differences, and nothing lost in packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qvl_runtime import Engine
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.functions import Documents, attend
from qvl_runtime.finetune.learner import Learner
from qvl_runtime.finetune.loss import cross_entropy_sum
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.options import PARTS
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.prompt.images import to_pixels
from tests.finetune.small import learner, sample
from tests.model.oracle import LOGITS, close

pytestmark = pytest.mark.cpu
NANO_INT4 = NANO.with_name("nano_int4")


def test_names_and_shapes_are_the_published_ones(source: Path) -> None:
    for folder in (NANO, source):
        config = ModelConfig.from_folder(folder)
        with torch.device("meta"):
            found = {name: tuple(tensor.shape) for name, tensor in Network(config).state_dict().items()}
        assert found == {name: spec.shape for name, spec in expected_tensors(config).items()}


@pytest.mark.parametrize("folder", [NANO, NANO_INT4, None], ids=["nano", "nano_int4", "tiny"])
def test_logits_are_the_engines(folder: Path | None, source: Path) -> None:
    folder = folder or source
    method = "qlora" if folder == NANO_INT4 else "lora"
    one = learner(folder, method=method)
    own = sample(one.network.c, 1, text=40)
    image = own.images[0].source
    engine = Engine(folder, device="cpu", dtype="float32", max_model_len=256)
    wanted = engine.score({"token_ids": list(own.ids), "images": [image]}, return_logits=True).logits
    with torch.no_grad():
        features = one.features([image])
        h = one.network.embed(torch.tensor([list(own.ids)]), features, torch.tensor([[0, own.images[0].start, 0]]))
        n = len(own)
        found = one.network.logits(one.network.decode(h, torch.arange(n)[None], Documents((0, n))))[0]
    assert wanted is not None
    close(found, wanted, LOGITS * max(1.0, wanted.std().item()), "logits")


def test_packed_samples_do_not_see_one_another(source: Path) -> None:
    one = learner(source, torch.float64)
    samples = [
        sample(one.network.c, seed, text, image) for seed, text, image in ((1, 12, True), (2, 30, False), (3, 7, True))
    ]
    with torch.no_grad():
        together = float(one.loss_sum(samples))
        alone = sum(float(one.loss_sum([each])) for each in samples)
    assert together == pytest.approx(alone, rel=1e-12)


def test_documents_attend_as_a_mask_says() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    document = torch.tensor([0] * 4 + [1] * 6 + [2])
    seen = (document[:, None] == document[None]) & torch.ones(11, 11, dtype=torch.bool).tril()
    mask = torch.zeros(11, 11, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, Documents((0, 4, 10, 11))), attend(q, k, v, mask))


def check_gradients(one: Learner, names: tuple[str, ...]) -> None:
    """Compare the derivative along a random direction of each parameter with a finite difference."""
    samples = [sample(one.network.c, 1), sample(one.network.c, 2, 9, image=False)]
    one.loss_sum(samples).backward()  # type: ignore[no-untyped-call]
    generator, step = torch.Generator().manual_seed(0), 1e-6
    parameters = dict(one.network.named_parameters())
    for name in names:
        parameter = parameters[name]
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(float(one.loss_sum(samples)))
                parameter.sub_(direction, alpha=sign * step)
        along = float((parameter.grad * direction).sum())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(along, rel=2e-5, abs=1e-6), name


def test_gradients_of_all_kinds_of_weights_are_finite_differences(source: Path) -> None:
    one = learner(source, torch.float64, method="full", parts=PARTS)
    names = [name for name, p in one.network.named_parameters() if p.requires_grad and "h.1." not in name]
    assert "transformer.visual.conv1.weight" in names and "lm_head.weight" in names
    check_gradients(one, tuple(names))


def test_gradients_of_side_paths(source: Path, whole: Path) -> None:
    for method, folder in (("lora", source), ("qlora", whole)):
        one = learner(folder, torch.float64, method=method, lora=AdapterConfig(r=4, lora_dropout=0.0))
        sides = {name: p for name, p in one.network.named_parameters() if p.requires_grad}
        assert sides and all(".adapter.lora_" in name for name in sides)
        for parameter in sides.values():
            torch.nn.init.normal_(parameter, std=0.1)
        check_gradients(one, tuple(name for name in sides if "h.0." in name))


def test_checkpointing_changes_nothing(source: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        one = learner(source, method="full", parts=PARTS, checkpointing=checkpointing)
        one.network.train()
        one.loss_sum([sample(one.network.c, 1), sample(one.network.c, 2)]).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in one.network.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_dropout_is_the_same_when_it_is_recomputed(source: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        one = learner(source, lora=AdapterConfig(r=4, lora_dropout=0.3), checkpointing=checkpointing)
        one.network.train()
        torch.manual_seed(5)
        one.loss_sum([sample(one.network.c, 1)]).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in one.network.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_bfloat16_is_near_float32() -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        one = learner(NANO, dtype=dtype)
        with torch.no_grad():
            losses.append(float(one.loss_sum([sample(one.network.c, 1, 60)])))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunked_cross_entropy_is_torchs(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head = (
        torch.randn(7, 5, generator=generator, dtype=torch.float64),
        torch.randn(11, 5, generator=generator, dtype=torch.float64),
    )
    targets = torch.randint(0, 11, (7,), generator=generator)
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            loss = cross_entropy_sum(h, w, targets, rows)
        else:
            loss = torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="sum")
        (loss * 0.3).backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None and w.grad is not None
        results.append((loss.detach(), h.grad, w.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_features_are_kept_by_digest_within_their_limit(source: Path) -> None:
    one = learner(source)
    images = [np.full((30, 30, 3), value, np.uint8) for value in (10, 10, 200)]
    first = one.features(images)
    assert torch.equal(first[0], first[1]) and (one.features.hits, one.features.misses) == (1, 2)
    with torch.no_grad():
        direct = one.network.visual(to_pixels(np.full((1, 28, 28, 3), 200, np.uint8)))[0]
    torch.testing.assert_close(first[2], direct)
    small = FeatureStore(one.network, max_bytes=1)
    small(images)
    small(images)
    assert small.misses == 4, "only the newest stays"


def test_with_a_trained_resampler_its_input_is_kept(source: Path) -> None:
    one = learner(source, method="full")
    assert one.features.frozen == "vit"
    features = one.features([np.full((30, 30, 3), 9, np.uint8)])
    features.sum().backward()  # type: ignore[no-untyped-call]
    assert one.network.visual.attn_pool.query.grad is not None and one.network.visual.conv1.weight.grad is None
