"""`qvl chat`: a conversation at the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_runtime.cli.terminal import (
    INTERRUPTED,
    box_lines,
    content,
    drawable,
    receive,
    save_drawing,
    say,
    say_error,
    speed_line,
)
from qvl_runtime.errors import ImageError, PromptError, QVLError

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

HELP = """\
/image PATH   show the model an image (file or address) with the next message
/draw FILE    write the image with the last answer's boxes drawn
/reset        forget the conversation
/help         this list
/quit         leave; so does Ctrl-D
Ctrl-C stops an answer; what has come of it stays in the conversation."""


@dataclass
class ChatSession:
    """The conversation so far, and what waits to be sent with the next message."""

    engine: Engine
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    pending_images: list[str] = field(default_factory=list)
    last: Completion | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.pending_images = []
        self.last = None

    def send(self, text: str) -> None:
        """One turn: the answer is streamed to standard output.

        A refused turn leaves the conversation as it was and drops the images that waited for it, one of which may be
        the cause. A stopped answer stays, as far as it came.
        """
        turn = {"role": "user", "content": content(text, self.pending_images)}
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
        source = argument.strip("'\"")  # as terminals quote a file that is dropped on them
        if not source:
            raise PromptError("/image needs a file or an address: /image dog.jpg")
        if "://" not in source and not source.startswith("data:"):
            path = Path(source).expanduser()
            if not path.is_file():
                raise ImageError(f"there is no file {path}; /image wants the path of an image")
            source = str(path)
        self.pending_images.append(source)
        say(f"goes with your next message: {source}")

    def draw(self, argument: str) -> None:
        if not argument:
            raise PromptError("/draw needs the file to write: /draw out.png")
        if self.last is None:
            raise PromptError("there is no answer to draw yet; ask for a box first: 'Box the dog'")
        path = save_drawing(self.last, drawable(Path(argument).expanduser()))
        if path is not None:
            say(f"wrote {path}")

    def command(self, line: str) -> bool:
        """Carry out a line that starts with a slash; False where it ends the session."""
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
            raise PromptError(f"no command {name}; /help lists them (start with a space to send the line as it is)")
        commands[name](argument.strip())
        return True


def converse(session: ChatSession) -> int:
    """Read lines until the end of input or `/quit`; returns the exit code.

    At a terminal a refused line is reported and the conversation goes on; through a pipe, where the next lines lean on
    this one, it ends with code 2.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        say("/help lists the commands, /image PATH shows an image, Ctrl-D leaves")
    interrupts = 0
    while True:
        try:
            line = input("you> ") if interactive else _read_line()
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
            say("Ctrl-C again or Ctrl-D leaves")
        except (QVLError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            say_error(error)
            if not interactive:
                return 2


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, where Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
