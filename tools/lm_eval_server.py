"""Let lm-eval evaluate `qvl serve` on the shipped nano, and compare each of its numbers with the engine's.

python -m tools.lm_eval_server .venv-lm-eval/bin/python
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qvl_runtime import Engine
from qvl_runtime.engine.engine import NANO
from tools.serving import serving

CLOSE = 2e-3  # nats a continuation, in float32: sums in another order


def main() -> int:
    """Run it; the exit code is 1 if a number differs."""
    with serving("--dtype", "float32") as url, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        script = Path(__file__).with_name("lm_eval_client.py")
        subprocess.run([sys.argv[1], str(script), f"{url}/v1", str(NANO / "qwen.tiktoken"), str(out)], check=True)
        found = json.loads(out.read_text())
    engine, worst, wrong = Engine(dtype="float32"), 0.0, 0
    for sample in found["samples"]:
        context = engine.tokenizer.encode(sample["context"], "none")
        whole = engine.tokenizer.encode(sample["context"] + sample["continuation"], "none")
        (scores,) = engine.score_continuations({"token_ids": context}, [whole[len(context) :]], top=1)
        worst = max(worst, abs(sum(score.logprob for score in scores) - sample["logprob"]))
        wrong += all(score.token_id == score.top[0][0] for score in scores) != sample["greedy"]
    print(f"{len(found['samples'])} continuations, accuracy {found['accuracy']:.3f}")
    print(f"largest difference {worst:.2e} nats, {wrong} of them greedy for one and not for the other")
    return int(worst > CLOSE or wrong > 0 or not found["samples"])


if __name__ == "__main__":
    sys.exit(main())
