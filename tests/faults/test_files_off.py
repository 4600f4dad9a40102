"""Files and URLs switched off: in every form of a prompt, every way in, and in the same words (FAULTS H3)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime import AsyncEngine, Completion, Engine, SamplingParams
from qvl_runtime.errors import ConfigError, DownloadError, ImageError
from tests.fakes import qvl

pytestmark = pytest.mark.cpu
ONE = SamplingParams(max_tokens=1)
OFF = "is a file path, which is not allowed here: send the image as a data URL"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(allow_files=False, allow_urls=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (8, 8)).save(folder / "there.png")
    (folder / "secret.txt").write_text("SECRET")
    return folder


def forms(engine: Engine, source: Any) -> list[Any]:
    """A prompt of every form with one image."""
    tokens = engine.tokenizer
    parts: list[Any] = [{"image": source}, {"text": "What is this?"}]
    prompts = [parts, [{"role": "user", "content": parts}]]
    prompts.append({"token_ids": [tokens.img_start, tokens.img_end, 5], "images": [source]})
    if isinstance(source, str):
        prompts.append(f"<img>{source}</img>What is this?")
        prompts.append([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}]}])
        prompts.append([{"type": "image_url", "image_url": source}])
    return prompts


@pytest.mark.parametrize("name", ["there.png", "missing.png", "secret.txt", "", "../there.png", "a\0b"])
def test_files_in_every_form(engine: Engine, folder: Path, name: str) -> None:
    words = set()
    for source in (f"{folder}/{name}", Path(folder / name), f"file://{folder}/{name}", f" {folder}/{name}\n"):
        for prompt in forms(engine, source):
            with pytest.raises(ImageError, match=OFF) as caught:
                engine.generate([prompt], ONE)
            words.add(str(caught.value).rpartition(") ")[2])
    assert words == {OFF}, "nothing tells what is on the disk"


def test_every_way_in(engine: Engine, folder: Path) -> None:
    prompt = forms(engine, f"{folder}/there.png")[1]
    for call in (
        lambda: engine.chat(prompt, ONE),
        lambda: list(engine.chat(prompt, ONE, stream=True)),
        lambda: list(engine.stream(prompt, ONE)),
        lambda: engine.score(prompt),
        lambda: engine.encode(prompt),
    ):
        with pytest.raises(ImageError, match=OFF):
            call()
    outcomes = dict(engine.as_completed([("a", prompt, ONE), ("b", "Hello", ONE)]))
    assert isinstance(outcomes["a"], ImageError) and isinstance(outcomes["b"], Completion)

    async def served() -> None:
        async with AsyncEngine(engine) as front:
            with pytest.raises(ImageError, match=OFF):
                await front.generate(prompt, ONE)
            assert (await front.generate("Hello", ONE)).usage.completion_tokens == 1

    asyncio.run(served())


def test_what_is_no_path_still_works(engine: Engine, folder: Path) -> None:
    data = (folder / "there.png").read_bytes()
    with (folder / "there.png").open("rb") as opened:  # opened by the program, not by the prompt
        for source in (data, opened, Image.new("RGB", (8, 8))):
            assert engine.generate([[{"image": source}]], ONE)[0].usage.images == 1


def test_urls_in_every_form(engine: Engine) -> None:
    for prompt in forms(engine, "http://127.0.0.1:1/a.png"):
        with pytest.raises(DownloadError, match=r"may not be fetched \(allow_urls is off\)"):
            engine.generate([prompt], ONE)


@pytest.mark.parametrize("option", ["allow_files", "allow_private_addresses"])
@pytest.mark.parametrize("wrong", ["no", 0, None])
def test_switches_are_true_or_false(option: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} is .*; expected True or False"):
        Engine(**{option: wrong})


class TestCommandLine:
    def test_generate(self, folder: Path) -> None:
        for name in ("there.png", "missing.png"):
            done = qvl("generate", "What?", "-i", folder / name, "--no-files", "--max-tokens", 1)
            assert done.exit_code == 2 and "not allowed here" in " ".join(done.stderr.split())
        done = qvl("generate", "What?", "-i", "http://127.0.0.1:1/a.png", "--no-urls", "--max-tokens", 1)
        assert done.exit_code == 2 and "--urls is off" in " ".join(done.stderr.split())
        assert qvl("generate", "What?", "-i", folder / "there.png", "--max-tokens", 1).exit_code == 0

    def test_private_addresses(self) -> None:
        url = "http://127.0.0.1:1/a.png"
        done = qvl("generate", "What?", "-i", url, "--max-tokens", 1)
        assert done.exit_code == 2 and "not at a public address (--allow-private-addresses is off)" in " ".join(
            done.stderr.split()
        )
        done = qvl("generate", "What?", "-i", url, "--allow-private-addresses", "--max-tokens", 1)
        assert done.exit_code == 2 and "Connection refused" in " ".join(done.stderr.split())

    def test_batch(self, folder: Path, tmp_path: Path) -> None:
        records = [{"prompt": "What?", "images": [f"{folder}/there.png"]}, {"raw": f"<img>{folder}/there.png</img>"}]
        records += [{"raw": {"token_ids": [1], "images": []}}, {"prompt": "Hello"}]
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        qvl("batch", source, target, "--no-files", "--max-tokens", 1, "-q")
        answers = [json.loads(line) for line in target.read_text().splitlines()]
        assert ["error" in answer for answer in answers] == [True, True, False, False]
        assert all(OFF in answer["error"] for answer in answers[:2])
