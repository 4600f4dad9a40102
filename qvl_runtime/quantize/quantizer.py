"""Quantize a float checkpoint to the published GPTQ layout, block by block: memory holds one block at a time.

The weights of a block are mapped, quantized in one forward pass over all calibration tokens (`quantize_block`), written
and released; between blocks only the residual stream of the calibration tokens stays in memory. A run that was stopped
resumes after the last block on the disk, and produces the same bytes with the same number of threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qvl_kernels import ops_for
from qvl_runtime.config.checks import read_json
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CapacityError, CheckpointError
from qvl_runtime.formats.host_memory import keep_heap, pieces, trim_heap
from qvl_runtime.formats.layout import decoder_linears, expected_tensors
from qvl_runtime.quantize.block import BlockQuantizer, CalibrationBatch, LinearError, quantize_block
from qvl_runtime.quantize.calibration import Calibration, embed, read_calibration
from qvl_runtime.quantize.job import COMMAND, Job, State, mapped
from qvl_runtime.quantize.options import Estimate, QuantizeOptions
from qvl_runtime.quantize.solver import TOKENS_AT_ONCE, Solver
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.files import write_json
from qvl_runtime.weights.partial import PartialFolder, check_destination, free_bytes
from qvl_runtime.weights.save import SHARD, copy_companions, quantized_config, write_config, write_shards
from qvl_runtime.weights.tensor_info import TensorInfo

REPORT = "quantize_report.json"
FLOAT16_MAX = 65504.0
HEAP_OVERHEAD = 1.2  # holes between tensors, in a heap that keeps those below 256 MiB (`keep_heap`): 2.3 GiB took 2.8


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """One quantization, checked and ready to run."""

    source: Path
    destination: Path
    options: QuantizeOptions
    config: ModelConfig
    calibration: Calibration
    device: torch.device

    @classmethod
    def open(
        cls,
        source: Path,
        destination: Path,
        options: QuantizeOptions | None = None,
        calibration: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Quantizer:
        """Check everything that can be checked in advance: source, destination, calibration file, disk.

        calibration: a file in Qwen-VL's fine-tuning format; None: the built-in drawn images and texts. Raises
        `CheckpointError`, `ConfigError`, `PromptError` or `ImageError`, each naming the fault.
        """
        source, destination, options = Path(source), Path(destination), options or QuantizeOptions()
        check_destination(source, destination)
        PartialFolder(destination, {"command": COMMAND, **_settings(options)}).check_idle()
        config = ModelConfig.from_folder(source)
        if config.quantization is not None:
            raise CheckpointError(
                f"{source} is quantized already, to {config.quantization.bits} bits: start from the float checkpoint"
            )
        replace(config, quantization=options.quantization)  # raises for widths that cannot be packed
        checkpoint = Checkpoint.open(source, config)
        _check_float16_range(checkpoint, config)
        data = read_calibration(config, source, calibration, options.samples, options.max_tokens)
        quantizer = cls(source, destination, options, config, data, torch.device(device))
        free, disk = free_bytes(destination), quantizer.estimate().disk
        if disk > free:
            raise CheckpointError(
                f"{destination} needs {disk:,} bytes while it is made and its disk has {free:,} free: make room for "
                f"{disk - free:,} more, or choose another disk"
            )
        return quantizer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: bfloat16 for a bfloat16 checkpoint, else float32."""
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32

    @property
    def num_linears(self) -> int:
        """How many linears will be quantized: the unit of progress."""
        return len(decoder_linears(self.config))

    def estimate(self) -> Estimate:
        """Estimate memory and disk from the shapes of the model and the number of calibration tokens."""
        c, sizes = self.config, {name: info.nbytes for name, info in self._tensors().items()}
        tokens, itemsize = sum(self.calibration.lengths), self.dtype.itemsize
        packed = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in decoder_linears(c))
        shapes = decoder_linears(c).values()
        # What a block's forward pass holds at once, and what is recorded of the float block's.
        drift, widest = self.options.streams - 1, max(i for _, i in shapes)
        per_token = 14 * c.hidden_size + 5 * c.ffn_width + drift * (5 * c.hidden_size + c.ffn_width)
        activations = tokens * itemsize * per_token
        # H and its factor (or the factor, and the drift in float32 and in the inputs' dtype), and some tokens; then the
        # last two, a weight in float32, its errors and codes, and three copies of the drifted weight.
        statistics = widest * (widest * (8 + drift * itemsize) + 4 * (1 + drift) * TOKENS_AT_ONCE)
        solving = max(i * i * (4 + drift * itemsize) + o * i * (10 + 10 * drift) for o, i in shapes)
        copied = self.dtype != getattr(torch, c.dtype) or self.device.type != "cpu"  # the float block's weights
        floats = drift * copied * itemsize * sum(o * i for o, i in shapes) // c.num_hidden_layers
        memory = int(HEAP_OVERHEAD * (activations + max(statistics, solving, floats)))
        result = sum(sizes.values())
        disk = result + packed + 2 * self.options.streams * tokens * itemsize * c.hidden_size
        samples = self.calibration.samples
        return Estimate(tokens, len(samples), self.calibration.shortened, memory, disk, result)

    def check_memory(self, free: int) -> None:
        """Raise `CapacityError` where `free` bytes of memory are not enough."""
        estimate = self.estimate()
        if estimate.memory > free:
            raise CapacityError(
                f"quantizing with {estimate.tokens:,} calibration tokens needs about "
                f"{estimate.memory / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: use "
                "fewer samples, or shorter ones"
            )

    def run(self, progress: Callable[[int], None] = lambda done: None) -> list[LinearError]:
        """Quantize and write the new checkpoint; returns the error of each linear.

        progress: called with the number of finished linears. Raises `CheckpointError` where another process is writing
        the destination, or an earlier run with other settings left layers there.
        """
        keep_heap()
        with Job(self.destination, self._key()) as job:
            return self._run(job, progress)

    def _run(self, job: Job, progress: Callable[[int], None]) -> list[LinearError]:
        shape = (self.options.streams, sum(self.calibration.lengths), self.config.hidden_size)
        state = job.resume(shape, self.config.num_hidden_layers)
        if state is None:
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            embed(self.config, Checkpoint.open(self.source), self.calibration, x[0])
            x[1:] = x[0]
            state = State(0, x, [])
            job.store(state, {})
        batch = CalibrationBatch.of(self.config, self.calibration.lengths, self.calibration.held_out, self.device)
        state = state._replace(x=state.x.to(self.device))
        progress(len(state.errors))
        while state.done < self.config.num_hidden_layers:
            block = self._block_quantizer(state.done, batch, partial(_add, progress, len(state.errors)))
            x = quantize_block(self.config, ops_for(self.device), block, state.x, batch)
            state = State(state.done + 1, x, state.errors + block.errors)
            job.store(state, block.packed)
            trim_heap()
        self._write(job, state.errors)
        return state.errors

    def _block_quantizer(self, layer: int, batch: CalibrationBatch, progress: Callable[[int], None]) -> BlockQuantizer:
        """The float weights and settings of a block. Its files are mapped for it alone: unmapping frees their pages."""
        checkpoint, prefix = Checkpoint.open(self.source), f"transformer.h.{layer}."
        state = {name: checkpoint.tensor(name) for name in checkpoint.names if name.startswith(prefix)}
        for norm in ("ln_1", "ln_2"):
            name = f"{prefix}{norm}.weight"
            state[name] = state[name].to(self.device, self.dtype)
        options = self.options
        solver = Solver(options.quantization, options.damping, options.order, options.drift)
        return BlockQuantizer(layer, state, options.method, solver, batch.num_fitted, progress)

    def _write(self, job: Job, errors: list[LinearError]) -> None:
        """Write the new checkpoint: the quantized linears of all blocks, and the rest in float16."""
        quantized, source = job.layers(self.config.num_hidden_layers), Checkpoint.open(self.source)
        tensors = self._tensors()

        def read(name: str) -> Iterator[Tensor]:
            stored = mapped(quantized[name], name) if name in quantized else source.tensor(name)
            return pieces(stored, getattr(torch, tensors[name].dtype))

        shutil.rmtree(job.model, ignore_errors=True)
        job.model.mkdir()
        write_shards(job.model, tensors, read, SHARD)
        raw = quantized_config(read_json(self.source / "config.json"), self.options.quantization)
        write_config(job.model, raw)
        write_json(job.model / REPORT, self.report(errors))
        copy_companions(self.source, job.model)
        job.publish()

    def report(self, errors: list[LinearError]) -> dict[str, Any]:
        """The options, the calibration data and the errors, without times: the same for the same work."""
        fields = ("layer", "linear", "error", "rtn_error", "damping")
        calibration = {
            "conversations": len(self.calibration.samples),
            "held_out": self.calibration.held_out,
            "rows": sum(self.calibration.lengths),
            "sha256": self.calibration.digest(),
        }
        linears = [{name: getattr(error, name) for name in fields} for error in errors]
        return {"options": asdict(self.options), "calibration": calibration, "linears": linears}

    def _tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the new checkpoint, in published order."""
        specs = expected_tensors(replace(self.config, quantization=self.options.quantization))
        return {name: TensorInfo(spec.shape, "int32" if spec.packed else "float16") for name, spec in specs.items()}

    def _key(self) -> Mapping[str, object]:
        """Everything that decides the result: only a run with the same key resumes another's work."""
        files = sorted([*self.source.glob("*.safetensors"), *self.source.glob("*.bin")])
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return _settings(self.options) | {
            "calibration": self.calibration.digest(),
            "source": stats,
            "device": self.device.type,
        }


def _settings(options: QuantizeOptions) -> dict[str, object]:
    """The options that decide the result."""
    settings = cast("dict[str, object]", asdict(options))
    settings["drift"] = options.drift if options.streams > 1 else 0.0  # unused in rounding to nearest
    return settings


def _check_float16_range(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise `CheckpointError` for a weight that stays float and would overflow float16, its dtype when published."""
    for name in expected_tensors(config):
        if name in checkpoint and name.rpartition(".")[0] not in decoder_linears(config):
            tensor = checkpoint.tensor(name)
            largest = float(torch.stack([part.abs().max() for part in pieces(tensor, tensor.dtype)]).max())
            if not largest <= FLOAT16_MAX:  # NaN, too
                raise CheckpointError(
                    f"{name} holds {largest:g}, beyond the {FLOAT16_MAX:g} of float16, its dtype in the published "
                    "layout: fine-tune in a narrower range"
                )


def _add(progress: Callable[[int], None], before: int, count: int) -> None:
    progress(before + count)
