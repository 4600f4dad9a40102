"""lmms-eval's `openai_compatible` on a task of its own: run by tools/lmms_eval_server.py, in lmms-eval's environment.

    python tools/lmms_eval_client.py URL FOLDER OUT.json

FOLDER has items.jsonl, each with "image" (a file) and "question". It imports nothing of this package: it stands for a
stranger's client.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TASK = """\
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: question
generation_kwargs:
  max_new_tokens: 24
  temperature: 0
process_results: !function utils.result
metric_list:
  - metric: answered
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, *_):
    return doc["question"]

def result(doc, answers):
    return {"answered": float(bool(answers[0]))}
"""


def main() -> None:
    """Evaluate, and write what each question was and what it got."""
    url, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_API_BASE": url, "HF_DATASETS_CACHE": str(folder / "cache")}
    (folder / "own.yaml").write_text(TASK.format(items=folder / "items.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    evaluator, tasks = import_module("lmms_eval.evaluator"), import_module("lmms_eval.tasks")
    found: Any = evaluator.simple_evaluate(
        model="openai_compatible",
        model_args=f"model_version=nano,base_url={url},num_concurrent=4,max_retries=1",
        tasks=["own"],
        task_manager=tasks.TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = {str(sample["doc_id"]): sample["filtered_resps"] for sample in found["samples"]["own"]}
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
