"""`qvl demo`: ask three questions about an image that ships with the package, draw the boxes, report the speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from qvl_runtime.cli.drawing import check_drawable, save_image
from qvl_runtime.cli.options import Debug, Font, RunOptions, user_message
from qvl_runtime.cli.terminal import printable, rate, size
from qvl_runtime.errors import ConfigError, QVLError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion

ASSETS = Path(__file__).parents[1] / "assets"

Out = Annotated[Path, typer.Option(metavar="FILE", help="Where to write the image with the boxes drawn on it.")]
Open = Annotated[bool, typer.Option("--open", help="Show it in the web browser: serve the page until Ctrl-C.")]


def demo(
    *,
    out: Out = Path("out/demo.png"),
    open_page: Open = False,
    font: Font = None,
    models: RunOptions,
    debug: Debug = False,
) -> int:
    """Caption an image that ships with qvl, answer a question about it, box an object, and report the speed.

    [cyan]qvl demo[/cyan]

    [cyan]qvl demo --open[/cyan]

    [cyan]qvl demo --model Qwen/Qwen-VL-Chat-Int4 --out boxed.png[/cyan]
    """
    if open_page:
        import webbrowser

        from qvl_runtime.cli.serve import ServeOptions
        from qvl_runtime.cli.serve import run as run_server

        options = ServeOptions(port=0, access_log=False)
        return run_server(options, models, lambda url: webbrowser.open(f"{url}/?example"))
    out.parent.mkdir(parents=True, exist_ok=True)
    check_drawable(out, font)
    run(models.open(), out, font=font)
    return 0


class DemoPlan(NamedTuple):
    """An image and three prompts about it."""

    image: Path
    caption_prompt: str
    question: str
    box_prompt: str

    @classmethod
    def from_folder(cls, folder: Path = ASSETS) -> DemoPlan:
        """Read `demo.json`; its image is in the same folder. Raises `ConfigError` if it is missing or incomplete."""
        from qvl_runtime.config.checks import read_json

        path = folder / "demo.json"
        raw = read_json(path)
        texts: dict[str, str] = {}
        for name in ("image", "caption_prompt", "question", "box_prompt"):
            value = raw.get(name)
            if not isinstance(value, str):
                raise ConfigError(f"{path} has {name} {value!r}; expected a string")
            texts[name] = value
        return cls(folder / texts.pop("image"), **texts)


def run(engine: Engine, out: Path, plan: DemoPlan | None = None, font: Path | None = None) -> None:
    """Run the plan's three prompts, write the image with the boxes of the answers to `out`, and print the speed."""
    from rich.console import Console

    from qvl_runtime.prompt.drawing import draw_boxes

    plan = plan or DemoPlan.from_folder()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"image  {plan.image}")
    tasks = {"caption": plan.caption_prompt, "question": plan.question, "box": plan.box_prompt}
    answers = {task: ask(engine, plan.image, prompt, console) for task, prompt in tasks.items()}
    boxes = list(answers["caption"].boxes)
    known = {box.label for box in boxes}  # an object that the caption boxed is not drawn twice
    boxes += [box for box in answers["box"].boxes if box.label not in known]
    save_image(draw_boxes(answers["box"].images[0].original, boxes, font), out)
    console.print(f"\nwrote    {out}, with {len(boxes)} box{'' if len(boxes) == 1 else 'es'} drawn\n")
    console.print(engine_table(engine))
    console.print()
    console.print(speed_table(answers))


def ask(engine: Engine, image: Path, prompt: str, console: Console) -> Completion:
    """Ask one question about the image in a new conversation; print the answer as it arrives."""
    from qvl_runtime.schedule.api import SamplingParams

    console.print(f"\n> {prompt}", style="bold")
    messages = [user_message(prompt, [str(image)])]
    completion = None
    for piece in engine.chat(messages, SamplingParams(temperature=0), stream=True):
        console.print(printable(piece.text), end="")
        completion = piece.completion
    console.print()
    if completion is None:
        raise QVLError("the engine's stream ended without a completion, which its last piece must carry")
    return completion


def engine_table(engine: Engine) -> Table:
    """The engine's report as a table."""
    from rich.table import Table

    report = engine.report()
    model, memory = report["model"], report["memory"]
    table = Table.grid(padding=(0, 2))
    table.add_row("ran on", f"{report['device']}, {report['dtype']}")
    kernels = dict(report["kernels"])
    table.add_row("kernels", f"{kernels.pop('ops')}: {kernels.pop('why')}")
    table.add_row("", "; ".join(f"{part}: {kernel}" for part, kernel in kernels.items()))
    table.add_row("model", f"{Path(model['folder']).name}, loaded in {model['load_s']:.1f} s")
    table.add_row("memory", f"{size(memory['weights'])} of weights, {size(memory['kv_reserved'])} of KV cache")
    return table


def speed_table(answers: dict[str, Completion]) -> Table:
    """Tokens and times of each answer; an image in the cache costs nothing the second time."""
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
