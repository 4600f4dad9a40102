"""The actor of a batch as a plain object: which thread reads pictures, and that answers are those of the engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime import Engine
from qvl_runtime.cluster.actor import ActorSpec, Answer, EngineActor, _may_download
from qvl_runtime.cluster.rows import Row
from qvl_runtime.engine.records import parse_request
from qvl_runtime.prompt.limits import CAN_ISOLATE
from qvl_runtime.reading.lines import MAX_LINE, Line
from tests.cluster.ray_helpers import ENGINE, GREEDY, write_rows


def rows(path: Path) -> list[Row]:
    return [Row(i, Line(i + 1, line, len(line))) for i, line in enumerate(path.read_bytes().splitlines())]


@pytest.mark.cpu
@pytest.mark.skipif(not CAN_ISOLATE, reason="threads of pictures are those that wait for their processes")
@pytest.mark.parametrize("threads", [1, 2])
def test_with_one_thread_pictures_are_read_between_steps(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path, 6, extra=({"id": "bad", "prompt": "?", "images": ["missing.png"]},))
    apart: list[bool] = []

    async def body() -> list[Answer]:
        actor = EngineActor(ActorSpec(ENGINE, GREEDY, str(path), MAX_LINE, threads, str(tmp_path)))
        assert not isinstance(await actor.load(), str)
        engine = actor._loaded()
        encode = engine.encode

        async def watched(prompt: Any) -> Any:
            apart.append(True)
            return await encode(prompt)

        monkeypatch.setattr(engine, "encode", watched)
        found = await actor.answer(rows(path))
        await engine.close()
        return found

    before, folder = torch.get_num_threads(), Path.cwd()
    monkeypatch.chdir(folder)  # `load` goes to the job's folder
    try:
        found = asyncio.run(body())
    finally:
        torch.set_num_threads(before)
    assert len(apart) == (0 if threads == 1 else 7)
    assert "missing.png" in (found[-1].error or "") and found[-1].id == "bad"
    engine = Engine(**ENGINE)
    for row, answer in zip(rows(path)[:3], found, strict=False):
        prompt, params = parse_request(json.loads(row.line.data), GREEDY)
        assert json.loads(answer.record or "")["text"] == engine.generate([prompt], params)[0].text


@pytest.mark.unit
@pytest.mark.parametrize(
    ("images", "may"),
    [(["a.png"], False), (["https://a.example/b.png"], True), (["data:image/png;base64,/a//b"], False)],
)
def test_rows_with_addresses_are_told(images: list[str], may: bool) -> None:
    plain = json.dumps({"prompt": "?", "images": images}).encode()
    for line in (plain, plain.replace(b"/", b"\\/")):
        assert _may_download(Row(0, Line(1, line, len(line)))) is may
