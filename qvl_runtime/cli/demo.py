"""`qvl demo`: three questions about an image that ships with the package, its boxes drawn, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_runtime.cli.terminal import content, printable, rate, size
from qvl_runtime.config.checks import read_json
from qvl_runtime.errors import ConfigError, QVLError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What is asked about which image."""

    image: Path
    caption_prompt: str
    question: str
    box_prompt: str

    @classmethod
    def from_folder(cls, folder: Path = ASSETS) -> DemoPlan:
        """Read `demo.json`, whose image lies beside it. Raises `ConfigError` where it is missing or incomplete."""
        path = folder / "demo.json"
        raw = read_json(path)
        texts: dict[str, str] = {}
        for name in ("image", "caption_prompt", "question", "box_prompt"):
            value = raw.get(name)
            if not isinstance(value, str):
                raise ConfigError(f"{path} has {name} {value!r}; expected a text")
            texts[name] = value
        return cls(folder / texts.pop("image"), **texts)


def run(engine: Engine, out: Path, plan: DemoPlan | None = None) -> None:
    """Ask the plan's three questions, write the image with the boxes of the answers to `out`, and say how fast."""
    from rich.console import Console

    from qvl_runtime.prompt.drawing import draw_boxes

    plan = plan or DemoPlan.from_folder()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"image  {plan.image}")
    tasks = {"caption": plan.caption_prompt, "question": plan.question, "box": plan.box_prompt}
    answers = {task: ask(engine, plan.image, prompt, console) for task, prompt in tasks.items()}
    boxes = list(answers["caption"].boxes)
    known = {box.label for box in boxes}  # what the caption has boxed is not drawn again on request
    boxes += [box for box in answers["box"].boxes if box.label not in known]
    draw_boxes(answers["box"].images[0].original, boxes).save(out)
    console.print(f"\nwrote    {out}, with {len(boxes)} box{'' if len(boxes) == 1 else 'es'} drawn\n")
    console.print(what_ran(engine))
    console.print()
    console.print(how_fast(answers))


def ask(engine: Engine, image: Path, prompt: str, console: Console) -> Completion:
    """One question about the image in a conversation of its own, the answer shown as it comes."""
    from qvl_runtime.schedule.api import SamplingParams

    console.print(f"\n> {prompt}", style="bold")
    messages = [{"role": "user", "content": content(prompt, [str(image)])}]
    completion = None
    for piece in engine.chat(messages, SamplingParams(temperature=0), stream=True):
        console.print(printable(piece.text), end="")
        completion = piece.completion
    console.print()
    if completion is None:
        raise QVLError("the engine's stream ended without a completion; every stream's last piece carries one")
    return completion


def what_ran(engine: Engine) -> Table:
    """The engine's report for a person."""
    from rich.table import Table

    said = engine.report()
    model, memory = said["model"], said["memory"]
    table = Table.grid(padding=(0, 2))
    table.add_row("ran on", f"{said['device']}, {said['dtype']}")
    kernels = dict(said["kernels"])
    table.add_row("kernels", f"{kernels.pop('ops')}: {kernels.pop('why')}")
    table.add_row("", "; ".join(f"{part}: {kernel}" for part, kernel in kernels.items()))
    table.add_row("model", f"{Path(model['folder']).name}, loaded in {model['load_s']:.1f} s")
    table.add_row("memory", f"{size(memory['weights'])} of weights, {size(memory['kv_reserved'])} of cache")
    return table


def how_fast(answers: dict[str, Completion]) -> Table:
    """Tokens and times of each answer; an image that the engine still knew costs nothing the second time."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("tokens in", "out", "image", "prefill", "decode", "first token"):
        table.add_column(heading, justify="right")
    for task, answer in answers.items():
        usage, timings = answer.usage, answer.timings
        table.add_row(
            task,
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            f"{1000 * (timings.image_s + timings.vision_s):.0f} ms",
            rate(timings.prefill_tokens_per_s),
            rate(timings.decode_tokens_per_s),
            f"{1000 * timings.ttft_s:.0f} ms",
        )
    return table
