"""The `openai` client against `qvl serve`: boxes as data, and a stream. Start `qvl serve` first, or set QVL_URL."""

import base64
import os
from pathlib import Path

from openai import OpenAI

IMAGE = Path(__file__).resolve().parents[2] / "qvl_runtime" / "assets" / "demo.jpg"
client = OpenAI(
    base_url=os.environ.get("QVL_URL", "http://127.0.0.1:8000/v1"), api_key=os.environ.get("QVL_KEY", "none")
)
model = client.models.list().data[0].id
url = "data:image/jpeg;base64," + base64.b64encode(IMAGE.read_bytes()).decode()


def ask(text: str) -> list:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


answer = client.chat.completions.create(model=model, messages=ask("Box the cat."))
for box in answer.choices[0].message.qvl["boxes"]:
    print(f"{box['label']} at pixels {box['pixels']}, score {box['score']:.2f}")

stream = client.chat.completions.create(model=model, messages=ask("What is the number?"), stream=True)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
