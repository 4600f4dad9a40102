"""The command line with a fake engine, in process and as a separate process."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from qvl_runtime import __version__
from qvl_runtime.cli.options import ModelOptions
from tests.fakes import BOXED, FakeEngine, make_image, qvl, start

pytestmark = pytest.mark.unit


COMMANDS = ["", "generate", "chat", "batch", "info", "demo", "serve", "profile", "profile memory"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    result = qvl(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    options = [line for line in result.stdout.splitlines() if "│ --" in line]
    assert options
    assert all(len(line.strip("│ ").split("  ")) >= 2 for line in options), "an option without help"
    assert "bool" not in result.stdout.lower(), "a flag that seems to want a value"


def test_version() -> None:
    result = qvl("--version")
    assert (result.exit_code, result.stdout) == (0, f"qvl {__version__}\n")


def test_generate_streams_the_answer_and_nothing_else_to_stdout(fake_engine: FakeEngine) -> None:
    result = qvl("generate", "Hello there")
    assert (result.exit_code, result.stdout) == (0, "you said Hello there\n")
    assert "note: from generation_config.json: top_p 0.5" in result.stderr


def test_quiet_keeps_notes_to_itself(fake_engine: FakeEngine) -> None:
    result = qvl("generate", "Hello", "--quiet")
    assert (result.stdout, result.stderr) == ("you said Hello\n", "")


def test_images_come_before_the_text_in_order(fake_engine: FakeEngine, image: str, tmp_path: Path) -> None:
    other = str(make_image(tmp_path / "cat.png"))
    assert qvl("generate", "Compare", "--image", image, "-i", other, "--system", "Be brief.").exit_code == 0
    ((messages, _),) = fake_engine.calls
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "image", "image": other},
                {"type": "text", "text": "Compare"},
            ],
        },
    ]


def test_sampling_options_reach_the_engine_and_absent_ones_stay_unset(fake_engine: FakeEngine) -> None:
    flags = "--max-tokens=7 --temperature=0.5 --top-p=0.9 --top-k=3 --seed=11 --stop=END --stop=STOP"
    assert qvl("generate", "x", *flags.split()).exit_code == 0
    assert qvl("generate", "x").exit_code == 0
    chosen, absent = (params for _, params in fake_engine.calls)
    assert (chosen.max_tokens, chosen.temperature, chosen.top_p, chosen.top_k, chosen.seed) == (7, 0.5, 0.9, 3, 11)
    assert chosen.stop == ("END", "STOP")
    assert (absent.max_tokens, absent.temperature, absent.top_p, absent.top_k, absent.seed) == (None,) * 5


def test_raw_hands_the_string_over_with_its_tags(fake_engine: FakeEngine, image: str) -> None:
    tagged = f"<img>{image}</img>Describe:"
    assert qvl("generate", tagged, "--raw").exit_code == 0
    assert qvl("generate", "Describe:", "--raw", "--image", image).exit_code == 0
    assert [prompt for prompt, _ in fake_engine.calls] == [tagged, [{"image": image}, {"text": "Describe:"}]]


def test_prompt_from_standard_input(fake_engine: FakeEngine) -> None:
    assert qvl("generate", "-", stdin="from a pipe\n").stdout == "you said from a pipe\n"


def test_json_is_one_object_with_everything(fake_engine: FakeEngine, image: str, tmp_path: Path) -> None:
    out = tmp_path / "boxed.png"
    result = qvl("generate", "Box the dog", "--image", image, "--json", "--draw", str(out))
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert answer["text"] == BOXED
    (box,) = answer["boxes"]
    assert (box["label"], box["x1"], box["y1"], box["x2"], box["y2"]) == ("dog", 100, 200, 300, 400)
    assert box["pixels"] == [6, 8, 18, 16]  # of 60 x 40
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 1,
        "image_tokens": 4,
        "images": 1,
        "cached_tokens": 0,
        "total_tokens": 11,
    }
    assert answer["finish_reason"] == "stop"
    assert answer["timings"]["ttft_s"] == pytest.approx(0.08)
    assert answer["timings"]["decode_tokens_per_s"] == pytest.approx(2.0)
    assert answer["drawn"] == str(out)
    with Image.open(out) as drawn:
        assert drawn.size == (60, 40)
        assert drawn.convert("L").getextrema()[0] < 255, "nothing is drawn on the white image"


def test_draw_without_a_box_says_so_and_writes_nothing(fake_engine: FakeEngine, image: str, tmp_path: Path) -> None:
    result = qvl("generate", "Describe", "--image", image, "--draw", str(tmp_path / "out.png"))
    assert result.exit_code == 0
    assert "the answer has no box" in result.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--image", "no/such.png"], "error: image no/such.png does not exist; give the path"),
        (["generate", "x", "--temperature", "-1"], "error: temperature is -1.0; expected 0 (greedy) or more"),
        (["generate", "x", "--max-tokens", "0"], "error: --max-tokens is 0; expected at least 1"),
        (["generate", "x", "--raw", "--system", "y"], "error: --system belongs to the chat format"),
        (["generate", "x", "--draw", "out.doc"], "error: cannot draw to out.doc: its name must end in .png"),
        (["generate", "x", "--draw", "no/such/out.png"], "error: cannot draw to no/such/out.png: the folder no/such"),
        (["chat", "--image", "no/such.png"], "error: file no/such.png does not exist"),
        (["info", "--model", "no such model"], "error: 'no such model' is neither a folder nor a hub id"),
        (["info", "--model", "a/b"], "error: 'a/b' is neither a folder nor in the local cache"),
    ],
)
def test_an_error_is_one_line_and_code_2(fake_engine: FakeEngine, arguments: list[str], message: str) -> None:
    result = qvl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    error = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(error) == 1
    assert error[0].startswith(message)


def test_a_broken_image_is_one_line(fake_engine: FakeEngine, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no image")
    result = qvl("generate", "x", "--image", str(broken), "--quiet")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "broken.jpg" in result.stderr


def test_a_wrong_flag_names_it_and_the_way_to_the_help() -> None:
    result = qvl("generate", "x", "--tempreature", "1")
    assert result.exit_code == 2
    assert "--tempreature" in result.stderr and "--help" in result.stderr


def test_a_bug_is_one_line_unless_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelOptions) -> None:
        raise RuntimeError("shapes differ:\n[1] and [2]")

    monkeypatch.setattr(ModelOptions, "open", fail)
    result = qvl("generate", "x")
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: shapes differ: [1] and [2] (a bug in qvl; --debug shows where)\n"
    assert isinstance(qvl("generate", "x", "--debug").exception, RuntimeError)


def test_ctrl_c_keeps_the_partial_text_and_exits_with_130() -> None:
    process = start("pause_s=0.05, words=10_000", "generate", "count", "--quiet")
    assert process.stdout is not None
    head = process.stdout.read(12)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (head + rest).startswith("word0 word1 ") and (head + rest).endswith("\n")
    assert errors == "ready\ninterrupted; the answer is incomplete\n"


def test_ctrl_c_with_json_still_gives_one_object() -> None:
    process = start("pause_s=0.01, words=10_000", "generate", "count", "--json", "--quiet")
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    time.sleep(0.5)  # some fifty words; nothing is written before the end to wait for
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    answer = json.loads(output)
    assert answer["finish_reason"] == "interrupted"
    assert answer["text"].startswith("word0 word1 ")


def test_a_closed_pipe_ends_it_silently() -> None:
    process = start("pause_s=0.001, words=100_000", "generate", "count", "--quiet")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(12)
    process.stdout.close()
    assert process.stderr.read() == "ready\n"
    assert process.wait(timeout=30) == 141


def test_control_characters_cannot_drive_a_terminal() -> None:
    from qvl_runtime.cli.terminal import printable

    assert printable("a\x1b[2Jb\r\x07\x9bc\td\n狗") == "a␛[2Jb␍␇\ufffdc\td\n狗"


def test_the_spinner_gives_the_cursor_back_after_ctrl_c() -> None:
    script = "import time; from qvl_runtime.cli.terminal import working\nwith working('loading'): time.sleep(60)"
    terminal, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=inside, stderr=inside, env=environment)
    seen = b""
    while b"loading" not in seen:
        seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    while select.select([terminal], [], [], 0.5)[0]:
        seen += os.read(terminal, 4096)
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1
    os.close(inside)
    os.close(terminal)
