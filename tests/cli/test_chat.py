"""`qvl chat` with a fake engine, through a pipe and at a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import termios
import time
from pathlib import Path

import pytest

from tests.fakes import BOXED, FakeEngine, qvl, start

pytestmark = pytest.mark.unit


def test_chat_through_a_pipe(fake_engine: FakeEngine, image: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jpg"
    first = ["Hello", "", f"/image '{image}'", "Box the dog", f"/draw {out}", "And now?"]
    lines = [*first, "/reset", " /etc", "/quit", "never sent"]
    result = qvl("chat", "--system", "Be brief.", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert result.stdout == f"you said Hello\n{BOXED}\nyou said And now?\nyou said /etc\n"
    assert out.stat().st_size > 0
    histories = [[message["role"] for message in messages] for messages, _ in fake_engine.calls]
    assert histories == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert fake_engine.calls[2][0][3] == {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Box the dog"}],
    }
    assert fake_engine.calls[2][0][4] == {"role": "assistant", "content": BOXED}


def test_chat_ends_with_its_input_and_shows_images_given_up_front(fake_engine: FakeEngine, image: str) -> None:
    assert qvl("chat", "--image", image, stdin="Look").exit_code == 0
    assert fake_engine.calls[0][0][0]["content"][0] == {"type": "image", "image": image}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "error: /image needs a file or a URL"),
        ("/image no/such.png", "error: file no/such.png does not exist"),
        ("/draw out.png", "error: no answer to draw yet"),
        ("/draw", "error: /draw needs an output file"),
        ("/imgae x", "error: unknown command /imgae; /help lists them"),
    ],
)
def test_chat_through_a_pipe_stops_at_an_error(fake_engine: FakeEngine, line: str, message: str) -> None:
    result = qvl("chat", stdin=f"{line}\nHello\n")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(message)


def test_chat_ctrl_c_through_a_pipe_ends_with_130() -> None:
    process = start("pause_s=0.05, words=10_000", "chat")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("count\n")
    process.stdin.flush()
    process.stdout.read(12)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def own_terminal() -> None:
    """In the child: standard input becomes the controlling terminal, so that typing Ctrl-C sends SIGINT."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_chat_at_a_terminal_survives_ctrl_c_and_errors_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = start("pause_s=0.01, words=1_000", "chat", **streams, preexec_fn=own_terminal)
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 30
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} did not come; seen: {seen!r}"
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode()
        seen = seen.split(text, 1)[1]

    def type_in(text: str) -> None:
        os.write(terminal, text.encode())

    read_until("you> ")
    type_in("/image no/such.png\n")
    read_until("error: file no/such.png does not exist")
    read_until("you> ")
    type_in("count\n")
    read_until("word3 ")
    type_in("\x03")
    read_until("stopped")
    read_until("you> ")
    time.sleep(1)  # Python's readline does not notice a signal between showing its prompt and waiting for a key
    type_in("\x03")
    read_until("press Ctrl-C again or Ctrl-D to quit")
    read_until("you> ")
    type_in("\x04")
    assert process.wait(timeout=30) == 0
    assert termios.tcgetattr(inside) == before
    os.close(inside)
    os.close(terminal)
