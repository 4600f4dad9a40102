"""What comes in files: configurations, vocabularies, published checkpoints, converted ones with their manifest."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import qvl_runtime
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.engine.engine import Engine
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.weights.loader import model_config
from qvl_runtime.weights.manifest import MANIFEST, _digest
from tools.fuzz import values
from tools.fuzz.harness import Case, Failure, Target

NANO = Path(qvl_runtime.__file__).parent / "nano"
NANO_INT4 = NANO.parent / "nano_int4"
SMALL = {"device": "cpu", "max_model_len": 64, "kv_cache_bytes": 2 << 20, "allow_urls": False}
TWO = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def _linked(source: Path, folder: Path) -> Path:
    """A folder whose files are those of `source`."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _overwrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _answer(folder: Path) -> None:
    completion = Engine(folder, **SMALL).generate([{"token_ids": [1, 2, 3]}], TWO)[0]  # type: ignore[arg-type]
    if completion.usage.completion_tokens != 2:
        raise Failure(f"answered with {completion.usage.completion_tokens} tokens; expected 2")


def configurations() -> Case:
    """Damaged config.json and generation_config.json: read, and where they are valid, used."""
    names = ("config.json", "generation_config.json")
    plain = {name: json.loads((NANO / name).read_text()) for name in names}

    def case(rng: random.Random) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _linked(NANO, Path(scratch) / "model")
            name = rng.choice(names)
            _overwrite(folder / name, values.encoded(rng, values.damaged(rng, plain[name])))
            config = model_config(folder)
            GenerationDefaults.from_folder(folder).check_ids(config.vocab_size)
            if rng.randrange(8) == 0:
                _answer(folder)

    return case


def published() -> Case:
    """Checkpoints with a damaged header, tensor, configuration of the quantization, index or vocabulary."""
    weights = (NANO_INT4 / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])

    def case(rng: random.Random) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _linked(NANO_INT4, Path(scratch) / "model")
            kind = rng.randrange(5)
            if kind == 0:
                head = values.encoded(rng, values.damaged(rng, header))
                size = rng.choice([len(head), len(head), len(head), rng.getrandbits(64)])
                _overwrite(folder / "model.safetensors", size.to_bytes(8, "little") + head + weights[8 + length :])
            elif kind == 1:
                _overwrite(folder / "model.safetensors", values.damaged_bytes(rng, weights))
            elif kind == 2:
                for name in ("config.json", "quantize_config.json"):
                    document = json.loads((NANO_INT4 / name).read_text())
                    _overwrite(folder / name, values.encoded(rng, values.damaged(rng, document)))
            elif kind == 3:
                _overwrite(folder / "qwen.tiktoken", values.damaged_bytes(rng, (NANO / "qwen.tiktoken").read_bytes()))
            else:
                index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}
                data = values.encoded(rng, values.damaged(rng, index))
                (folder / "model.safetensors.index.json").write_bytes(data)
            _answer(folder)

    return case


def converted() -> Case:
    """Converted checkpoints with a damaged shard, or a damaged manifest of the right digest: loaded and restored."""
    from qvl_runtime.convert.convert import convert
    from qvl_runtime.convert.restore import restore
    from qvl_runtime.convert.verify import verify

    home = Path(tempfile.mkdtemp(prefix="qvl-fuzz-"))
    convert(NANO_INT4, home / "plain")
    manifest = json.loads((home / "plain" / MANIFEST).read_text())
    shards = sorted(path.name for path in (home / "plain").glob("*.safetensors"))

    def case(rng: random.Random) -> None:
        scratch = Path(tempfile.mkdtemp(dir=home))
        guard = scratch / "guard"  # what a name with ../ would overwrite
        guard.write_text("as it was")
        # Hard links: a symbolic one that leads out of the folder is refused before the manifest is used.
        folder = Path(shutil.copytree(home / "plain", scratch / "model", copy_function=os.link))
        try:
            if rng.random() < 0.8:
                content = values.damaged(rng, manifest)
                if isinstance(content, dict):
                    if rng.random() < 0.3:
                        content = json.loads(json.dumps(content).replace('"model.safetensors"', '"../guard"'))
                    content.pop("sha256", None)
                    content["sha256"] = _digest(content)
                _overwrite(folder / MANIFEST, values.encoded(rng, content))
            else:
                name = rng.choice(shards)
                _overwrite(folder / name, values.damaged_bytes(rng, (home / "plain" / name).read_bytes()))
            kind = rng.randrange(3)
            if kind == 0:
                restore(folder, scratch / "restored")
            elif kind == 1:
                verify(folder)
            else:
                _answer(folder)
        finally:
            untouched = guard.read_text() == "as it was"
            shutil.rmtree(scratch, ignore_errors=True)
            if not untouched:
                raise Failure("a file outside the destination was written")

    return case


TARGETS = (Target("configurations", configurations), Target("published", published), Target("converted", converted))
