"""Export a training state as checkpoints in the published layout: bfloat16, and its GPTQ Int4 sibling.

`python -m tools.nano.export DIR` rebuilds the sibling DIR_int4 from the bfloat16 checkpoint alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from qvl_runtime.weights.save import save_checkpoint

from .conversations import write_conversations
from .network import random_network
from .vocabulary import RANKS

GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": RANKS,
    "pad_token_id": RANKS,
    "max_window_size": 6144,
    "max_new_tokens": 256,
    "do_sample": False,
    "top_k": 0,
    "top_p": 1.0,
}
TOKENIZER = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
INT4 = QuantizeOptions(group_size=64, samples=256)  # `samples` scenes for calibration


def export(run: Path, target: Path) -> list[Path]:
    """Write `target` and `target`_int4 from the averaged weights of a run's state.pt, and replace older ones."""
    raw = json.loads((run / "config.json").read_text())
    averaged = torch.load(run / "state.pt", weights_only=True, mmap=True)["average"]
    config = ModelConfig.from_dict(raw)
    model = random_network(config)
    model.load_state_dict(averaged, strict=False)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}

    companions = run / "export"
    companions.mkdir(exist_ok=True)
    (companions / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (companions / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n")
    shutil.copyfile(run / "qwen.tiktoken", companions / "qwen.tiktoken")

    shutil.rmtree(target, ignore_errors=True)
    save_checkpoint(target, state, raw, companions)
    return [target, export_int4(target)]


def export_int4(source: Path) -> Path:
    """Quantize `source` on scenes of nano's own world to `source`_int4, and replace an older one."""
    target = source.with_name(f"{source.name}_int4")
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        own = write_conversations(Path(name), INT4.samples, ModelConfig.from_folder(source).visual.image_size)
        Quantizer.open(source, Path(name) / "int4", INT4, own).run()
        shutil.rmtree(target, ignore_errors=True)
        (Path(name) / "int4").rename(target)
    return target


def main() -> None:
    """Quantize the checkpoint DIR into DIR_int4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the bfloat16 checkpoint")
    print(export_int4(parser.parse_args().folder))


if __name__ == "__main__":
    main()
