"""LoRA adapters of an engine: each request its own, the same answer alone and in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError, SamplingError
from qvl_runtime.formats.adapter import Adapter, AdapterConfig, Side, linears_of

pytestmark = pytest.mark.cpu
NANO_INT4 = NANO.with_name("nano_int4")
CONFIG = ModelConfig.from_folder(NANO)
QUESTIONS = ["Hello!", "Who are you?", "What can you do?"]


def adapter(seed: int, targets: tuple[str, ...], scale: float = 0.03) -> Adapter:
    """Random side paths, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    config = AdapterConfig(r=8, lora_alpha=8, target_modules=targets)
    sides = {}
    for name, (outputs, inputs) in linears_of(CONFIG).items():
        if name.startswith("transformer.h.") and name.endswith(targets):
            a, b = (torch.randn(shape, generator=generator) for shape in ((8, inputs), (outputs, 8)))
            sides[name] = Side(a, b * scale)
    return Adapter(config, sides, {})


ADAPTERS = {"first": adapter(1, ("c_attn", "w2")), "second": adapter(2, ("attn.c_proj", "w1", "w2", "mlp.c_proj"))}


def ask(engine: Engine, names: list[str | None], tokens: int = 8) -> list[tuple[int, ...]]:
    prompts = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(len(names))]
    params = [SamplingParams(temperature=0, max_tokens=tokens, adapter=name, ignore_eos=True) for name in names]
    return [completion.token_ids for completion in engine.generate(prompts, params)]


@pytest.mark.parametrize("folder", [NANO, NANO_INT4], ids=["bf16", "int4"])
def test_a_mixed_batch_answers_as_each_request_alone(folder: Path) -> None:
    names = [None, "first", "second", None, "first", "second"]
    engine = Engine(folder, adapters=ADAPTERS, max_model_len=256)
    assert engine.adapter_names == ("first", "second") and engine.report()["memory"]["adapters"] > 0
    together = ask(engine, names)
    alone = []
    for i, name in enumerate(names):
        prompt = [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]
        params = SamplingParams(temperature=0, max_tokens=8, adapter=name, ignore_eos=True)
        alone.append(engine.generate([prompt], params)[0].token_ids)
    assert together == alone
    plain = Engine(folder, max_model_len=256)
    assert [together[0], together[3]] == ask(plain, [None, None, None, None])[::3], "the base model is not touched"
    assert len({together[0], together[3], *together}) > 2, "adapters change answers"


def test_an_adapter_computes_what_merged_weights_do() -> None:
    engine = Engine(NANO, dtype="float32", adapters=ADAPTERS, max_model_len=256)
    from qvl_runtime.weights.checkpoint import load_state
    from qvl_runtime.weights.loader import Weights

    for name, own in ADAPTERS.items():
        state = load_state(NANO, CONFIG, torch.float32)
        for module, (a, b) in own.sides.items():
            state[f"{module}.weight"] = state[f"{module}.weight"] + own.config.scale * b @ a
        merged = Engine(NANO, dtype="float32", weights=Weights(state, {}), max_model_len=256)
        prompt = {"token_ids": list(range(40))}
        found = engine.score(prompt, return_logits=True, adapter=name).logits
        wanted = merged.score(prompt, return_logits=True).logits
        assert found is not None and wanted is not None
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_adapters_share_no_cached_prefix() -> None:
    engine = Engine(NANO, adapters=ADAPTERS, max_model_len=256)
    prompt = [{"role": "user", "content": "A long question, longer than a block of the cache. " * 3}]
    cached = []
    for name in ("first", "second", None, "first"):
        params = SamplingParams(temperature=0, max_tokens=2, adapter=name)
        cached.append(engine.generate([prompt], params)[0].usage.cached_tokens)
    assert cached[:3] == [0, 0, 0] and cached[3] > 0


def test_what_cannot_be_loaded_or_asked_for_is_named(tmp_path: Path) -> None:
    engine = Engine(NANO, adapters=ADAPTERS, max_model_len=256)
    with pytest.raises(SamplingError, match=r"adapter is 'third'.*'first', 'second'"):
        engine.generate(["a"], SamplingParams(adapter="third"))
    with pytest.raises(SamplingError, match=r"none: pass adapters"):
        Engine(NANO, max_model_len=256).score("a b", adapter="first")
    with pytest.raises(SamplingError, match="adapter"):
        SamplingParams(adapter=7)
    saved = ADAPTERS["first"]._replace(saved={"lm_head": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"'own' changes lm_head.*qvl merge"):
        Engine(NANO, adapters={"own": saved}, max_model_len=256)
