"""What a message tells its reader to set can be set: an option at the shell, a parameter in a program."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

import qvl_runtime
from qvl_runtime import Engine
from qvl_runtime.cli.flags import as_flags, flags_of
from qvl_runtime.cli.options import EngineOptions, ModelOptions, RunOptions, SamplingOptions, parse_count
from qvl_runtime.config.engine import EngineConfig
from tests.fakes import make_image, qvl

PACKAGE = Path(qvl_runtime.__file__).parent
FIELDS = {field.name: field.default for field in fields(EngineConfig)}


def texts(path: Path) -> list[str]:
    """All strings of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [str(node.value) for node in strings if id(node) not in statements]


@pytest.mark.unit
def test_each_parameter_that_a_message_names_is_an_option() -> None:
    """HilbertRaum#118, realesrgan-gui#34: "raise max_image_pixels" named an option that no command had."""
    named = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        for text in texts(path):  # one that begins with "NAME is " is of a value that its reader gave: no advice
            if " " in text and not re.match(r"\w+ is ", text):
                named |= {name for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text) if name in FIELDS}
    assert {"max_image_pixels", "max_image_bytes", "max_images", "image_timeout_s", "kv_cache_bytes"} <= named
    assert named <= set(flags_of(EngineOptions)), named - set(flags_of(EngineOptions))


@pytest.mark.unit
def test_options_have_the_defaults_that_their_help_says() -> None:
    hints = get_type_hints(EngineOptions, include_extras=True)
    for field in fields(EngineOptions):
        default = FIELDS.get(field.name, field.default)
        assert field.default in (None, default), field.name
        said = re.search(r"Default: ([\d.,]+\w*)\.$", get_args(hints[field.name])[1].help or "")
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert said is not None and parse_count(said[1]) == default, field.name


@pytest.mark.unit
def test_options_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Fake:
        def __init__(self, **options: Any) -> None:
            given.append(options)
            EngineConfig(**{name: value for name, value in options.items() if name in FIELDS})
            raise qvl_runtime.QVLError("enough")

    monkeypatch.setattr("qvl_runtime.engine.engine.Engine", Fake)
    limits = {
        "--max-image-pixels": ("48M", "max_image_pixels", 48_000_000),
        "--max-image-bytes": ("20MiB", "max_image_bytes", 20 * 2**20),
        "--max-images": ("64", "max_images", 64),
        "--image-timeout-s": ("2.5", "image_timeout_s", 2.5),
    }
    sizes = {
        "--max-model-len": ("2k", "max_model_len", 2000),
        "--kv-cache-bytes": ("1.5GiB", "kv_cache_bytes", 3 * 2**29),
        "--kv-dtype": ("int8", "kv_dtype", "int8"),
        "--max-running": ("8", "max_running", 8),
        "--max-step-tokens": ("512", "max_step_tokens", 512),
        "--image-cache-bytes": ("1G", "image_cache_bytes", 10**9),
    }
    for command, flags in (("generate", limits | sizes), ("chat", limits | sizes), ("demo", sizes)):
        arguments = [word for flag, (text, _, _) in flags.items() for word in (flag, text)]
        result = qvl(command, *(["x"] if command == "generate" else []), *arguments)
        assert result.stderr == "error: enough\n", result.stderr
        assert {name: given[-1][name] for _, name, _ in flags.values()} == {n: v for _, n, v in flags.values()}
    qvl("generate", "x")
    assert not set(given[-1]) & {name for _, name, _ in limits.values()}, "what is not given is left to the engine"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "value"),
    [("48M", 48_000_000), ("48m", 48_000_000), ("64Mi", 2**26), ("20MB", 20_000_000), ("20 MiB", 20 * 2**20),
     ("1.5k", 1500), ("67,108,864", 2**26), ("1_000", 1000), ("0", 0), (".5G", 500_000_000), ("2T", 2 * 10**12),
     ("9007199254740993", 2**53 + 1)],
)  # fmt: skip
def test_numbers_with_units(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.unit
@pytest.mark.parametrize("text", ["", "M", "48X", "-1", "1e3M", "48MM", "nan", "four"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected one such as 500000, 48M or 20MiB"):
        parse_count(text)
    result = qvl("generate", "x", f"--max-images={text}")
    assert result.exit_code == 2 and "48M or 20MiB" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.unit
@pytest.mark.parametrize("text", ["9" * 400, "9223372036854775808", "9999999999T", "9" * 5000])
def test_numbers_that_are_too_large(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is too large; expected at most 9223372036854775807"):
        parse_count(text)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("shrink it or raise max_image_pixels", "shrink it or raise --max-image-pixels"),
        ("raise kv_cache_bytes, or use kv_dtype='int8'", "raise --kv-cache-bytes, or use --kv-dtype int8"),
        ("use device='cpu' or device='auto'", "use --device cpu or --device auto"),
        ("pass download=True to download it", "pass --download to download it"),
        ("max_images is -1; expected 0 or more", "--max-images is -1; expected 0 or more"),
        ("embedding_on_host is set, but", "--embedding-on-host is set, but"),
        ("(max_images)", "(--max-images)"),
        ("set deep_pixels to 'stretch'", "set --deep-pixels to 'stretch'"),
        # Not parameters, or words of English:
        ("a device and a model of this source", "a device and a model of this source"),
        ("image /tmp/max_images/a.png is cut", "image /tmp/max_images/a.png is cut"),
        ("image max_images.png is cut", "image max_images.png is cut"),
        ("unknown key 'max_images'", "unknown key 'max_images'"),
        ("params.max_images", "params.max_images"),
        ("my_max_images and max_images_of", "my_max_images and max_images_of"),
        ("", ""),
    ],
)
def test_messages_in_the_words_of_the_shell(message: str, said: str) -> None:
    assert as_flags(message, flags_of(EngineOptions)) == said


@pytest.mark.unit
def test_a_file_may_have_names_of_sampling_options() -> None:
    """generation_config.json has a top_p as well, which --top-p does not mend."""
    assert as_flags("generation_config.json has top_p 2", flags_of(EngineOptions)).endswith("top_p 2")
    assert as_flags("top_p is 2", flags_of(SamplingOptions)) == "--top-p is 2"
    assert qvl("generate", "x", "--top-p", 2).stderr.startswith("error: --top-p is 2.0; expected")


@pytest.mark.unit
@pytest.mark.parametrize(
    "command", [("convert", "a/b", "c"), ("quantize", "a/b", "c"), ("plan", "a/b"), ("info", "-m", "a/b")]
)
def test_every_command_with_a_hub_id_can_download_it(command: tuple[str, ...]) -> None:
    """`qvl convert` and `qvl quantize` told their readers to use an option that they did not have."""
    result = qvl(*command)
    assert result.exit_code == 2 and "pass --download to download it" in result.stderr
    assert "--download" in qvl(command[0], "--help").stdout and "--source" in qvl(command[0], "--help").stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_image(tmp_path_factory.mktemp("images") / "photo.png", (100, 60)))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("flag", "low", "high"),
    [
        ("--max-image-pixels", "5999", "6k"),
        ("--max-image-bytes", "50", "1M"),
        ("--max-images", "1", "2"),
        ("--max-model-len", "32", "2k"),
    ],
)
def test_what_a_message_says_helps(image: str, flag: str, low: str, high: str) -> None:
    arguments = ("generate", "x", "-i", image, "-i", image, "--max-tokens", 1, "--quiet")
    refused = qvl(*arguments, flag, low)
    assert refused.exit_code == 2 and f"raise {flag}" in refused.stderr, refused.stderr
    assert qvl(*arguments, flag, high).exit_code == 0


@pytest.mark.cpu
def test_an_error_of_a_request_names_the_option_of_the_batch(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt": "x", "images": [image]}, {"raw": "x", "params": {"max_tokens": 0}}]
    source.write_text("\n".join(map(json.dumps, records)))
    engine = Engine(max_image_pixels=100)
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    assert qvl("batch", source, target).exit_code == 3
    errors = [json.loads(line)["error"] for line in target.read_text().splitlines()]
    assert "raise --max-image-pixels" in errors[0]
    assert errors[1].startswith("max_tokens is 0"), "that is a key of the request"


@pytest.mark.unit
def test_a_photo_of_48_megapixels_passes() -> None:
    EngineConfig().image_limits.check_pixels(8064, 6048, "a photo")


@pytest.mark.unit
def test_groups_of_options() -> None:
    """`info` opens no engine, and a demo reads no image of the user: their options would do nothing."""
    names = [set(flags_of(group)) for group in (ModelOptions, RunOptions, EngineOptions)]
    assert names[0] < names[1] < names[2] <= set(FIELDS) | {"model", "download", "source"}


@pytest.mark.cpu
def test_a_font_for_labels(image: str, tmp_path: Path) -> None:
    """The warning about missing glyphs named a parameter that no caller of the command line has."""
    result = qvl("generate", "x", "-i", image, "--draw", tmp_path / "a.png", "--font", tmp_path / "no.ttf")
    assert result.exit_code == 2 and "no.ttf cannot be opened" in result.stderr
