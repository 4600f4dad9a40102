"""Answer several prompts together: `python examples/generate.py [MODEL]`."""

import sys
from pathlib import Path

from qvl_runtime import Engine, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"


def ask(question: str) -> list[dict[str, object]]:
    """One chat turn about the image. A bare list of parts would be continued as text, without the chat format."""
    return [{"role": "user", "content": [{"image": IMAGE}, {"text": question}]}]


engine = Engine(sys.argv[1] if len(sys.argv) > 1 else None)
questions = ["What is in the picture?", "How many objects are there?", "图里有什么?"]
prompts = [ask(question) for question in questions]

# The image is encoded once: the three prompts share its features and, where they begin alike, the KV cache.
for question, answer in zip(questions, engine.generate(prompts, SamplingParams(temperature=0)), strict=True):
    usage = answer.usage
    print(f"{question}\n  {answer.text}  [{usage.prompt_tokens} + {usage.completion_tokens} tokens]")
