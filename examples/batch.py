"""Answer a stream of records as each is done: `python examples/batch.py`. On the shell: `qvl batch IN OUT`."""

from pathlib import Path

from qvl_runtime import Engine, QVLError, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"
RECORDS = [
    {"id": "caption", "image": IMAGE, "question": "What is in the picture?"},
    {"id": "broken", "image": "no-such-file.jpg", "question": "What is this?"},
    {"id": "cat", "image": IMAGE, "question": "Box the cat."},
]


def chat(record: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"image": record["image"]}, {"text": record["question"]}]}]


engine = Engine()
greedy = SamplingParams(temperature=0)
requests = ((record["id"], chat(record), greedy) for record in RECORDS)  # read as they are needed
for tag, answer in engine.as_completed(requests):
    if isinstance(answer, QVLError):  # one bad record does not stop the others
        print(f"{tag}: error: {answer}")
    else:
        print(f"{tag}: {answer.text}")
