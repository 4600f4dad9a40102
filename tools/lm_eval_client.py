"""lm-eval's `local-completions` on a task of its own: run by tools/lm_eval_server.py, in lm-eval's environment.

    python tools/lm_eval_client.py URL VOCABULARY OUT.json

It imports nothing of this package: it stands for a stranger's client.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

# A question, its answers, and which is meant. What a model makes of them does not matter: that all agree does.
ITEMS = [
    ("What color is the sky? It is", [" blue", " red", " a cat", " 2066"], 0),
    ("One, two, three,", [" four", " seven", " red", " the"], 0),
    ("The cat is to the left of the", [" number", " star", " cat", " cat."], 1),
    ("How many objects are there? There are", [" 3", " 33", " three objects", " 你好"], 0),
    ("图里有什么?有", ["猫", "红色的星", "数字", " cat"], 0),
    ("A", [" red star and a blue banana next to the number 2066", " b", " the green circle"], 0),
]


def encoding(vocabulary: Path) -> Any:
    """The checkpoint's tokenizer, as lm-eval uses tiktoken's."""
    tiktoken = import_module("tiktoken")
    lines = [line.split() for line in vocabulary.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    pattern += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def main() -> None:
    """Evaluate, and write what each request was and what it got."""
    url, vocabulary, out = sys.argv[1:]
    tiktoken: Any = import_module("tiktoken")
    tiktoken.encoding_for_model = lambda name: encoding(Path(vocabulary))
    lm_eval, models = import_module("lm_eval"), import_module("lm_eval.models.openai_completions")
    with tempfile.TemporaryDirectory() as folder:
        items = Path(folder) / "items.jsonl"
        rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in ITEMS]
        items.write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(items)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        model = models.LocalCompletionsAPI(
            base_url=f"{url}/completions", model="nano", tokenizer_backend="tiktoken", batch_size=4, max_length=1024
        )
        found = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = [
        {"context": arguments[0], "continuation": arguments[1], "logprob": float(got[0]), "greedy": bool(got[1])}
        for sample in found["samples"]["own"]
        for arguments, got in zip(_arguments(sample), sample["filtered_resps"], strict=True)
    ]
    Path(out).write_text(json.dumps({"accuracy": found["results"]["own"]["acc,none"], "samples": samples}))


def _arguments(sample: dict[str, Any]) -> list[Any]:
    found = sample["arguments"]
    return [(a["arg_0"], a["arg_1"]) for a in found.values()] if isinstance(found, dict) else list(found)


if __name__ == "__main__":
    main()
