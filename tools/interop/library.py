"""Quantize a float checkpoint with another project's library, or run the linears of quantized ones with it.

    python library.py write auto-gptq FLOAT_FOLDER OUT_FOLDER '{"a name": {"bits": 4, "group_size": 64, "sym": true}}'
    python library.py read gptqmodel FOLDER ...

It runs in that library's environment, without this project. `write` makes a folder for each name; `read` stores the
outputs of every linear of the decoder, in the library's own modules, as FOLDER.outputs: for inputs that both sides can
make, in the dtype that the library computes in.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
CODE = "modeling_qwen.py"
ROWS = 5
CALIBRATION = (48, 64)  # sequences, tokens
Settings = Mapping[str, Any]


def inputs(features: int) -> Tensor:
    """Rows [ROWS, features] with nothing random, so that every version of torch makes the same."""
    index = torch.arange(ROWS * features, dtype=torch.float64)
    return torch.sin(index * 0.7 + (index % 13) ** 2).view(ROWS, features).float()


def calibration(vocabulary: int) -> list[dict[str, Tensor]]:
    """Sequences of token ids in which most tokens occur."""
    sequences, tokens = CALIBRATION
    ids = torch.arange(sequences * tokens, dtype=torch.int64)
    ids = ((ids * 7919 + ids * ids * 31) % vocabulary).view(sequences, 1, tokens)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def outputs_of(folder: Path) -> Path:
    """The file with the outputs of a checkpoint's linears, next to it."""
    return folder.with_name(f"{folder.name}.outputs")


def prepare() -> None:
    """Let libraries that expect a GPU run on a CPU: they synchronize with one after each linear."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one by default, and then refuses that
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None


def float_model(folder: Path) -> Any:
    """The float checkpoint as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()


def add_tokenizer(folder: Path) -> None:
    """A tokenizer that GPTQModel can load, as it insists on one; token ids are given, so no text goes through it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def write_auto_gptq(source: Path, target: Path, settings: Settings) -> None:
    """AutoGPTQ: its class for Qwen, whose loader insists on a GPU, so the model is passed to the constructor."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import QwenGPTQForCausalLM, _base, _utils

    _base.CUDA_0 = _utils.CUDA_0 = torch.device("cpu")  # the device on which it quantizes each block
    model = float_model(source)
    wrapped = QwenGPTQForCausalLM(model, False, BaseQuantizeConfig(**settings))
    wrapped.quantize(calibration(model.config.vocab_size), use_cuda_fp16=False, cache_examples_on_gpu=False)
    wrapped.model.half()
    wrapped.save_quantized(str(target), use_safetensors=True)


def write_optimum(source: Path, target: Path, settings: Settings) -> None:
    """Optimum's quantizer, over GPTQModel."""
    from optimum.gptq import GPTQQuantizer

    model = float_model(source)
    rows = calibration(model.config.vocab_size)
    quantizer = GPTQQuantizer(
        **settings,
        dataset=[str(number) for number in range(len(rows))],  # it stores them, so they are short
        block_name_to_quantize="transformer.h",
        module_name_preceding_first_block=["transformer.wte"],
        model_seqlen=CALIBRATION[1],
        batch_size=1,
        pad_token_id=0,
    )
    quantized = quantizer.quantize_model(model, tokenizer=lambda text, **_: rows[int(text)])
    quantizer.save(quantized, str(target), safe_serialization=True)


def write_gptqmodel(source: Path, target: Path, settings: Settings) -> None:
    """GPTQModel, from loading to saving."""
    from gptqmodel import GPTQModel, QuantizeConfig

    add_tokenizer(source)
    config = QuantizeConfig(**settings, offload_to_disk=False)
    model = GPTQModel.load(str(source), config, trust_remote_code=True, device="cpu")
    model.quantize(calibration(model.model.config.vocab_size), batch_size=1)
    model.save(str(target))


def read_auto_gptq(folder: Path) -> Any:
    """AutoGPTQ's loader, with its kernels in torch and on the CPU."""
    from auto_gptq.modeling import QwenGPTQForCausalLM

    (stem,) = (path.stem for path in folder.glob("*.safetensors"))
    loaded = QwenGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu",
        model_basename=stem,
        use_safetensors=True,
        trust_remote_code=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        use_cuda_fp16=False,
        torch_dtype=torch.float32,
    )
    return loaded.model.float()


def read_optimum(folder: Path) -> Any:
    """Optimum's own loader."""
    from accelerate import init_empty_weights
    from optimum.gptq import load_quantized_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    del config.quantization_config  # a dict, which it takes for an object; it reads quantize_config.json then
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return load_quantized_model(empty, str(folder), device_map={"": "cpu"})


def read_gptqmodel(folder: Path) -> Any:
    """GPTQModel's loader, with its kernels in torch."""
    from gptqmodel import BACKEND, GPTQModel

    add_tokenizer(folder)
    return GPTQModel.load(
        str(folder), trust_remote_code=True, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    ).model


WRITERS: dict[str, Callable[[Path, Path, Settings], None]] = {
    "auto-gptq": write_auto_gptq,
    "optimum": write_optimum,
    "gptqmodel": write_gptqmodel,
}
READERS: dict[str, Callable[[Path], Any]] = {
    "auto-gptq": read_auto_gptq,
    "optimum": read_optimum,
    "gptqmodel": read_gptqmodel,
}


@torch.inference_mode()
def outputs(model: Any, library: str) -> dict[str, Tensor]:
    """The outputs [ROWS, out] of each linear of the decoder."""
    found = {}
    for name, module in model.named_modules():
        if not name.startswith("transformer.h.") or name.split(".", 3)[-1] not in LINEARS:
            continue
        if isinstance(module, nn.Linear):
            raise SystemExit(f"{name} is not quantized")
        x = inputs(getattr(module, "in_features", 0) or module.infeatures)
        found[name] = module(x if library == "auto-gptq" else x.half()).contiguous()
    return found


def main() -> None:
    """Run the command of the command line; exit status 1 if a folder fails, after the others."""
    from safetensors.torch import save_file

    prepare()
    command, library, *rest = sys.argv[1:]
    failed = []
    if command == "write":
        source, target = Path(rest[0]), Path(rest[1])
        for name, settings in json.loads(rest[2]).items():
            try:
                WRITERS[library](source, target / name, settings)
                for file in (CODE, "qwen.tiktoken", "generation_config.json"):
                    shutil.copyfile(source / file, target / name / file)
            except Exception as error:
                failed.append(f"{library} {name}: {type(error).__name__}: {error}")
    for folder in map(Path, rest if command == "read" else []):
        try:
            save_file(outputs(READERS[library](folder), library), outputs_of(folder))
        except Exception as error:
            failed.append(f"{library} {folder.name}: {type(error).__name__}: {error}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
