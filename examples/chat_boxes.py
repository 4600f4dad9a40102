"""Ask for a box, read it as data, draw it, ask on: `python examples/chat_boxes.py [OUT.png]`."""

import sys
from pathlib import Path

from qvl_runtime import Engine, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"

engine = Engine()
greedy = SamplingParams(temperature=0)
messages = [{"role": "user", "content": [{"image": IMAGE}, {"text": "Box the cat."}]}]
reply = engine.chat(messages, greedy)
for box in reply.boxes:
    original = reply.images[0]
    print(box.label, box.pixels(original.width, original.height), f"score {box.score:.2f}")
reply.draw().save(sys.argv[1] if len(sys.argv) > 1 else "boxed.png")

# The second turn finds the image and the first turn in the cache.
messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "How many objects are there?"}]
reply = engine.chat(messages, greedy)
print(f"{reply.text} objects")
print(f"{reply.usage.cached_tokens} of {reply.usage.prompt_tokens} prompt tokens came from the cache")
