"""`qvl chat`: a conversation at the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_runtime.cli.drawing import check_drawable, save_drawing
from qvl_runtime.cli.options import Debug, EngineOptions, Font, Images, SamplingOptions, System, user_message
from qvl_runtime.cli.streams import Closed, argument_text, check_output, input_decoded, input_lines
from qvl_runtime.cli.terminal import (
    INTERRUPTED,
    box_lines,
    receive,
    say,
    say_error,
    speed_line,
)
from qvl_runtime.errors import ImageError, PromptError, QVLError
from qvl_runtime.reading.lines import Line

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

HELP = """\
/image PATH   attach an image (file or URL) to the next message
/draw FILE    write the image with the last answer's boxes drawn on it
/reset        start a new conversation
/help         show this list
/quit         quit (or press Ctrl-D)
Ctrl-C stops an answer; the text so far stays in the conversation."""


def chat(
    *,
    image: Images = None,
    system: System = None,
    models: EngineOptions,
    sampling: SamplingOptions,
    font: Font = None,
    debug: Debug = False,
) -> int:
    """Chat with the model, one line per message; type /help for the commands.

    [cyan]qvl chat --image dog.jpg[/cyan]

    [cyan]printf 'Hello!\\nBox the dog\\n' | qvl chat --image dog.jpg[/cyan]
    """
    check_output()
    if isinstance(sys.stdin, Closed):
        sys.stdin.refuse()
    system = None if system is None else argument_text(system, "--system")
    params, engine = sampling.params(), models.open()
    if note := engine.defaults_note(params):
        say(f"note: {note}")
    session = ChatSession(engine, params, system, font)
    for source in image or []:
        session.attach(source)
    return converse(session)


class ChatSession:
    """The conversation so far, and the images attached to the next message."""

    messages: list[dict[str, Any]]
    pending_images: list[str]
    last: Completion | None

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None = None, font: Path | None = None
    ) -> None:
        self.engine, self.params, self.system, self.font = engine, params, system, font
        self.reset()

    def reset(self) -> None:
        """Start a new conversation with the same system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.pending_images = []
        self.last = None

    def send(self, text: str) -> None:
        """Send one message and stream the answer to standard output.

        A turn that fails leaves the conversation unchanged and drops its images, since one of them may be the cause.
        The text of a stopped answer is kept.
        """
        turn = user_message(text, self.pending_images)
        self.pending_images = []
        answer = receive(self.engine.chat([*self.messages, turn], self.params, stream=True), echo=True)
        if answer.text:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        self.last = answer.completion
        if self.last is None:
            say("stopped")
            if not sys.stdin.isatty():
                raise KeyboardInterrupt
        elif sys.stdin.isatty():
            for line in [*box_lines(self.last), speed_line(self.last)]:
                say(line)

    def attach(self, argument: str) -> None:
        """Attach an image, a file or a URL, to the next message. Raises `PromptError` or `ImageError`."""
        source = argument.strip("'\"")  # terminals quote a file that is dropped on them
        if not source:
            raise PromptError("/image needs a file or a URL: /image dog.jpg")
        if "://" not in source and not source.startswith("data:"):
            path = Path(source).expanduser()
            if not path.is_file():
                raise ImageError(f"file {path} does not exist; /image needs the path of an image")
            source = str(path)
        self.pending_images.append(source)
        say(f"attached to your next message: {source}")

    def draw(self, argument: str) -> None:
        """Write the last answer's image with its boxes to a file. Raises `PromptError` or `ImageError`."""
        if not argument:
            raise PromptError("/draw needs an output file: /draw out.png")
        if self.last is None:
            raise PromptError("no answer to draw yet; ask for a box first: 'Box the dog'")
        path = Path(argument).expanduser()
        check_drawable(path, self.font)
        if save_drawing(self.last, path, self.font) is not None:
            say(f"wrote {path}")

    def command(self, line: str) -> bool:
        """Run a line that starts with a slash; returns False if it ends the session."""
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self.attach,
            "/draw": self.draw,
            "/reset": lambda _: self.reset(),
            "/help": lambda _: print(HELP),
        }
        if name in ("/quit", "/exit"):
            return False
        if name not in commands:
            raise PromptError(
                f"unknown command {name}; /help lists them (to send the line as text, start it with a space)"
            )
        commands[name](argument.strip())
        return True


def converse(session: ChatSession) -> int:
    """Read lines until the end of input or `/quit`; returns the exit code.

    At a terminal, an error is reported and the conversation continues. From a pipe, where later lines depend on
    earlier ones, it ends with code 2.
    """
    interactive = sys.stdin.isatty()
    lines = iter(()) if interactive else input_lines()
    if interactive:
        _enable_line_editing()
        say("/help lists the commands, /image PATH attaches an image, Ctrl-D quits")
    interrupts = 0
    while True:
        try:
            line = input("you> ") if interactive else _next_line(lines)
            interrupts = 0
            if line.startswith("/"):
                if not session.command(line.rstrip()):
                    return 0
            elif line.strip():
                session.send(line.strip())
        except EOFError:
            if interactive:
                print()
            return 0
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1 or not interactive:
                return INTERRUPTED
            print(file=sys.stderr)
            say("press Ctrl-C again or Ctrl-D to quit")
        except (QVLError, OSError, UnicodeDecodeError) as error:  # the last of a terminal in another encoding
            if isinstance(error, BrokenPipeError):
                raise
            say_error(error)
            if not interactive:
                return 2


def _next_line(lines: Iterator[Line]) -> str:
    if (line := next(lines, None)) is None:
        raise EOFError
    if line.size > len(line.data):
        raise PromptError(f"standard input line {line.number} has {line.size:,} bytes; expected a message on each line")
    return input_decoded(line.data, line.number)


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, if Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
