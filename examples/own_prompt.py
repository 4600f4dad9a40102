"""Token ids, log probabilities and a scored prompt: `python examples/own_prompt.py`."""

from pathlib import Path

from qvl_runtime import Engine, SamplingParams

IMAGE = Path(__file__).parents[1] / "qvl_runtime" / "assets" / "demo.jpg"

engine = Engine()
visual, tokenizer = engine.config.visual, engine.tokenizer

# An image takes the place of whatever stands between its start and end ids.
ids = [visual.image_start_id, visual.image_end_id, *tokenizer.encode("Generate the caption in English:")]
(answer,) = engine.generate(
    [{"token_ids": ids, "images": [IMAGE]}], SamplingParams(temperature=0, max_tokens=8, logprobs=2)
)
for token in answer.logprobs:
    alternatives = ", ".join(f"{tokenizer.decode([i])!r} {p:.2f}" for i, p in token.top)
    print(f"{tokenizer.decode([token.token_id])!r:>12} {token.logprob:6.2f}   of {alternatives}")

score = engine.score(f"<img>{IMAGE}</img>Generate the caption in English: a cat")
print(f"the prompt itself: {len(score.token_ids)} tokens, {score.logprobs[-2:].mean():.2f} nats a token at its end")
