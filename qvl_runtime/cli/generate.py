"""`qvl generate`: answer one prompt, streaming the text to standard output or printing one JSON object."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.drawing import check_drawable, save_drawing
from qvl_runtime.cli.options import (
    OUTPUT,
    AsJson,
    Debug,
    EngineOptions,
    Font,
    Images,
    Quiet,
    SamplingOptions,
    System,
    user_message,
)
from qvl_runtime.cli.streams import argument_text, check_output, input_text
from qvl_runtime.cli.terminal import (
    INTERRUPTED,
    Answer,
    box_lines,
    print_json,
    receive,
    say,
    speed_line,
)
from qvl_runtime.errors import PromptError

if TYPE_CHECKING:
    from qvl_runtime.prompt.boxes import Box
    from qvl_runtime.schedule.api import Completion

Raw = Annotated[
    bool, typer.Option("--raw", help="Skip the chat format: continue PROMPT verbatim, with <img>FILE</img> expanded.")
]
Draw = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the image with the answer's boxes drawn.", rich_help_panel=OUTPUT),
]


def generate(
    *,
    prompt: Annotated[str, typer.Argument(help="The question or instruction; - reads it from standard input.")],
    image: Images = None,
    system: System = None,
    raw: Raw = False,
    models: EngineOptions,
    sampling: SamplingOptions,
    as_json: AsJson = False,
    draw: Draw = None,
    font: Font = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Answer one prompt, streaming the text as it is generated.

    [cyan]qvl generate "What number is on the plate?" -i car.jpg --temperature 0[/cyan]

    [cyan]qvl generate "图里有什么?" -i one.jpg -i two.jpg[/cyan]

    [cyan]qvl generate "Box the dog" -i dog.jpg --draw boxed.png --json[/cyan]

    [cyan]echo "Describe it" | qvl generate - -i dog.jpg --quiet[/cyan]
    """
    check_output()
    text = input_text().strip() if prompt == "-" else argument_text(prompt, "the prompt")
    system = None if system is None else argument_text(system, "--system")
    images = image or []
    if raw and system is not None:
        raise PromptError("--system belongs to the chat format, which --raw turns off; drop one of the two")
    if draw is not None:
        check_drawable(draw, font)
    params, engine = sampling.params(), models.open()
    if not quiet and (note := engine.defaults_note(params)):
        say(f"note: {note}")
    if raw:
        pieces = engine.stream([*({"image": source} for source in images), {"text": text}] if images else text, params)
    else:
        opening = [] if system is None else [{"role": "system", "content": system}]
        pieces = engine.chat([*opening, user_message(text, images)], params, stream=True)
    answer = receive(pieces, echo=not as_json)
    drawing = None
    if answer.completion is not None and draw is not None:
        drawing = save_drawing(answer.completion, draw, font)
    if as_json:
        print_json(answer_json(answer, drawing))
    if answer.completion is None:
        say("interrupted; the answer is incomplete")
        return INTERRUPTED
    if not (quiet or as_json) and sys.stderr.isatty():
        for line in [*box_lines(answer.completion), speed_line(answer.completion)]:
            say(line)
    return 0


def answer_json(answer: Answer, drawing: Path | None) -> dict[str, Any]:
    """The answer as one JSON object; an interrupted one has only its text and its finish reason."""
    record: dict[str, Any] = {"text": answer.text, "finish_reason": "interrupted"}
    if (completion := answer.completion) is not None:
        derived = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")
        timings = asdict(completion.timings) | {name: getattr(completion.timings, name) for name in derived}
        record |= {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "boxes": [_box_record(box, completion) for box in completion.boxes],
            "token_ids": list(completion.token_ids),
            "usage": asdict(completion.usage) | {"total_tokens": completion.usage.total_tokens},
            "timings": {name: round(value, 6) for name, value in timings.items()},
            "drawn": None if drawing is None else str(drawing),
        }
    return record


def _box_record(box: Box, completion: Completion) -> dict[str, Any]:
    """The fields of a box, plus its corners in pixels of the image that it belongs to."""
    image = completion.images[-1 if box.image_index is None else box.image_index] if completion.images else None
    return asdict(box) | {"pixels": None if image is None else box.pixels(image.width, image.height)}
