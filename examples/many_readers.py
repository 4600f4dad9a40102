"""Serve several readers at once with `AsyncEngine`: `python examples/many_readers.py`."""

import asyncio
from pathlib import Path

from qvl_runtime import AsyncEngine, Engine, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"
QUESTIONS = ["What is in the picture?", "Box the cat.", "How many objects are there?"]


async def read(engine: AsyncEngine, question: str) -> None:
    """Collect one stream; leaving the loop early would cancel the request and free its memory."""
    text, messages = "", [{"role": "user", "content": [{"image": IMAGE}, {"text": question}]}]
    async for piece in engine.stream(messages, SamplingParams(temperature=0)):
        text += piece.text
    print(f"{question}  {text}")


async def main() -> None:
    async with AsyncEngine(Engine()) as engine:
        await asyncio.gather(*(read(engine, question) for question in QUESTIONS))


asyncio.run(main())
