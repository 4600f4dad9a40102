"""The engine on a CUDA device returns the greedy tokens of the CPU, with CUDA graphs and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.cli.options import user_message
from qvl_runtime.engine.engine import NANO

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
# An int4 checkpoint in float16, its own dtype; the float checkpoint in float32, where roundings cannot decide a token.
MODELS = {"nano": "float32", "nano_int4": "float16"}


def greedy_tokens(engine: Engine) -> list[list[int]]:
    """Token ids of the greedy answers to the demo's three prompts about its image, batched."""
    plan = DemoPlan.from_folder()
    prompts = [
        [user_message(text, [str(plan.image)])] for text in (plan.caption_prompt, plan.question, plan.box_prompt)
    ]
    return [list(out.token_ids) for out in engine.generate(prompts, SamplingParams(max_tokens=64, temperature=0))]


@cache
def cpu_tokens(name: str) -> list[list[int]]:
    """The answers on the CPU."""
    return greedy_tokens(Engine(NANO.parent / name, device="cpu", dtype=MODELS[name], max_model_len=512))


# The tests' own process interprets Triton (see conftest.py), so the GPU's kernels are compiled in another.
ON_CUDA = """
import json, sys
from qvl_runtime import Engine
from tests.engine.test_gpu import MODELS, NANO, greedy_tokens

name, graphs = sys.argv[1], sys.argv[2] == "graphs"
options = {"max_model_len": 512, "kv_cache_bytes": 64 << 20, "graphs": graphs}
engine = Engine(NANO.parent / name, device="cuda", dtype=MODELS[name], **options)
tokens = greedy_tokens(engine)
used = engine.core.runner.graphs
replays = used.replays if used is not None else 0
print(json.dumps({"tokens": tokens, "replays": replays, "ops": engine.report()["kernels"]["ops"]}))
"""


@pytest.mark.parametrize("graphs", ["graphs", "no graphs"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_cpu(name: str, graphs: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "QVL_KERNELS")}
    ran = subprocess.run(
        [sys.executable, "-c", ON_CUDA, name, graphs], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout.splitlines()[-1])
    assert got["ops"].startswith("Triton kernels (sm_")
    assert (got["replays"] > 0) == (graphs == "graphs")
    assert got["tokens"] == cpu_tokens(name)
