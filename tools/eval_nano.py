"""Score a nano checkpoint on fresh scenes, as `qvl evaluate` does: `python -m tools.eval_nano [--scenes 500] [--int4]`.

The scenes come from seeds that training never draws. Every question is asked as a first turn, greedily, and an answer
is right when it is the expected text; `qvl_runtime/evaluate/metrics/scenes.py` says what counts for captions and boxes.
Writes the table as Markdown to the terminal and, with `--out`, the counts as JSON. `qvl evaluate nano scenes` gives the
same figures with intervals, on the folder that `python -m tools.nano.datasets` writes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qvl_runtime import Engine
from qvl_runtime.cli.terminal import progress_bar
from qvl_runtime.evaluate.asking import EngineAsker
from qvl_runtime.evaluate.report import report_task
from qvl_runtime.evaluate.runner import RunOptions, run_task
from qvl_runtime.evaluate.tasks.table import TASKS
from tools.nano.datasets import write_scenes
from tools.nano.scenes import SceneConfig, check_fonts
from tools.nano.scoring import Tally

PACKAGE = Path(__file__).parent.parent / "qvl_runtime"
# What the project asks of the shipped checkpoint, in percent.
TARGETS = {
    "caption: object recalled": 92,
    "caption: box IoU >= 0.5": 85,
    "box: box IoU >= 0.5": 78,
    "questions, all": 88,
    "relation": 75,
    "number: digit": 93,
    "number: whole": 80,
}


def evaluate(folder: Path, dtype: str, precision: str, scenes: int, chinese: bool) -> Tally:
    """Score the checkpoint on `scenes` fresh scenes."""
    engine = Engine(folder, dtype=dtype, precision=precision, max_model_len=1024)
    print(engine.summary())
    tally = Tally()
    with TemporaryDirectory() as scratch, progress_bar("asking", None) as advance:
        data = Path(scratch) / "data"
        write_scenes(data, scenes, SceneConfig(side=engine.config.visual.image_size).side, chinese)
        task, asker = TASKS["scenes_zh" if chinese else "scenes"], EngineAsker(engine, folder.name)
        run = run_task(task, asker, RunOptions(data), data / "run", lambda done, _: advance(done))
        for mark in report_task(run, asker.chat_format).marks:
            tally.add(mark.name, bool(mark.value))
    return tally


def table(tallies: dict[str, Tally]) -> str:
    """A Markdown table: one row a score, one column a checkpoint, and the standard error of the first."""
    first = next(iter(tallies.values()))
    lines = [f"| | answers | target | {' | '.join(tallies)} | standard error |"]
    lines.append("|---" * (len(tallies) + 4) + "|")
    for name in first.rates:
        rate, n = first.rates[name], first.sizes[name]
        shown = " | ".join(f"{100 * t.rates.get(name, float('nan')):.1f}" for t in tallies.values())
        target = f">= {TARGETS[name]}" if name in TARGETS else ""
        lines.append(f"| {name} | {n} | {target} | {shown} | {100 * (rate * (1 - rate) / n) ** 0.5:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Score the checkpoints, print the table, and write the counts if `--out` is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=PACKAGE / "nano", help="checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--int4", action="store_true", help="also score its Int4 sibling, MODEL_int4")
    parser.add_argument("--dtype", default="auto", help="of both (default: what each checkpoint says)")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"], help="of the kernels")
    parser.add_argument("--scenes", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--chinese", action="store_true", help="ask in Chinese")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write counts as JSON here")
    args = parser.parse_args()
    check_fonts()
    torch.set_num_threads(args.threads)
    folders = [args.model, args.model.with_name(f"{args.model.name}_int4")] if args.int4 else [args.model]
    began, tallies = time.perf_counter(), {}
    for folder in folders:
        tallies[folder.name] = evaluate(folder, args.dtype, args.precision, args.scenes, args.chinese)
    print(f"\n{args.scenes} scenes, {'Chinese' if args.chinese else 'English'}, {time.perf_counter() - began:.0f} s\n")
    print(table(tallies))
    if args.out is not None:
        counts = {name: {"right": t.right, "asked": t.sizes} for name, t in tallies.items()}
        args.out.write_text(json.dumps({"scenes": args.scenes, "chinese": args.chinese, **counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
