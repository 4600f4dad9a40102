"""Print an answer as it is generated: `python examples/stream.py [MODEL]`."""

import sys
from pathlib import Path

from qvl_runtime import Engine, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"

engine = Engine(sys.argv[1] if len(sys.argv) > 1 else None)
prompt = [{"role": "user", "content": [{"image": IMAGE}, {"text": "What is in the picture?"}]}]
for piece in engine.stream(prompt, SamplingParams(temperature=0)):
    print(piece.text, end="", flush=True)
    if piece.completion is not None:  # the last piece carries the whole answer and its timings
        timings = piece.completion.timings
        print(f"\nfirst token after {timings.ttft_s:.2f} s, then {timings.decode_tokens_per_s:,.0f} tokens/s")
