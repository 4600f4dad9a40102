"""A float checkpoint to a GPTQ one in the published layout, block by block, so that memory holds one block at a time.

The weights of a block are mapped, quantized in one forward pass over all calibration rows (`quantize_block`), written,
and let go; between blocks there is nothing but the residual stream of the calibration rows. Work that was stopped is
gone on with after the last block that is on the disk, and gives the same bytes with the same number of threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qvl_kernels import ops_for
from qvl_runtime.config.checks import read_json, require_choice, require_positive
from qvl_runtime.config.model import ModelConfig, QuantizationConfig
from qvl_runtime.errors import CapacityError, CheckpointError, ConfigError
from qvl_runtime.formats.host_memory import keep_heap, pieces, trim_heap
from qvl_runtime.formats.layout import decoder_linears, expected_tensors
from qvl_runtime.quantize.block import Bench, LinearError, Method, Rows, quantize_block
from qvl_runtime.quantize.calibration import Calibration, embed, read_calibration
from qvl_runtime.quantize.job import Job, State, mapped
from qvl_runtime.quantize.solver import ROWS_AT_ONCE, Order, Solver
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.files import write_json
from qvl_runtime.weights.partial import check_destination, free_bytes
from qvl_runtime.weights.save import SHARD, copy_companions, quantized_config, write_config, write_shards
from qvl_runtime.weights.shards import TensorInfo

REPORT = "quantize_report.json"
MOST_FLOAT16 = 65504.0
HOLES = 1.2  # between tensors, in a heap that keeps those below 256 MiB (`keep_heap`): 2.3 GiB took 2.8


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a checkpoint is to be quantized, and on what that is calibrated."""

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128  # inputs that share a scale; -1: all of them
    sym: bool = True
    order: Order = "static"  # full: what the published format calls desc_act
    damping: float = 0.01
    drift: float = 0.5  # share that is made up for of what rounding earlier layers did to a linear's inputs
    samples: int = 64  # conversations, an eighth of which are held out to measure on
    max_tokens: int = 512  # of a conversation; what is beyond is cut

    def __post_init__(self) -> None:
        require_choice("method", self.method, ("gptq", "rtn"))
        require_choice("bits", self.bits, (4, 8))
        require_choice("group size", self.group_size, (32, 64, 128, -1))
        require_choice("order", self.order, ("none", "static", "full"))
        require_positive(self, "", "damping", "samples", "max_tokens")
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"drift is {self.drift:g}; expected a share from 0, as GPTQ was published, to 1")

    @property
    def streams(self) -> int:
        """Residual streams that are followed: the quantized model's, and the float one's to make up for drift."""
        return 2 if self.method == "gptq" and self.drift else 1

    @property
    def quantization(self) -> QuantizationConfig:
        full = self.order == "full" and self.method == "gptq"
        return QuantizationConfig(self.bits, self.group_size, desc_act=full, sym=self.sym)


class Outline(NamedTuple):
    """What a quantization takes, known before it starts."""

    rows: int  # tokens and image rows that are calibrated on
    conversations: int
    shortened: int  # conversations that were cut to `max_tokens`
    memory: int  # bytes, about, beyond the program itself
    disk: int  # bytes, the result and what is kept meanwhile
    result: int  # bytes of the new checkpoint


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
        """Check everything that can be checked before the work: source, destination, calibration file, disk.

        calibration: a file in Qwen-VL's fine-tuning format; None: drawn images and texts that come with the package.
        Raises `CheckpointError`, `ConfigError`, `PromptError` or `ImageError`, each naming the fault.
        """
        source, destination, options = Path(source), Path(destination), options or QuantizeOptions()
        check_destination(source, destination)
        config = ModelConfig.from_folder(source)
        if config.quantization is not None:
            raise CheckpointError(
                f"{source} is quantized already, to {config.quantization.bits} bits: start from the float checkpoint"
            )
        replace(config, quantization=options.quantization)  # refuses widths that cannot be packed
        checkpoint = Checkpoint.open(source, config)
        _refuse_beyond_float16(checkpoint, config)
        read = read_calibration(config, source, calibration, options.samples, options.max_tokens)
        job = cls(source, destination, options, config, read, torch.device(device))
        free, disk = free_bytes(destination), job.outline().disk
        if disk > free:
            raise CheckpointError(
                f"{destination} needs {disk:,} bytes on the way and its disk has {free:,} free: make room for "
                f"{disk - free:,} more, or choose another disk"
            )
        return job

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: bfloat16 where the checkpoint is, else float32."""
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32

    @property
    def linears(self) -> int:
        """How many are to be quantized: what progress is counted in."""
        return len(decoder_linears(self.config))

    def outline(self) -> Outline:
        c, sizes = self.config, {name: info.nbytes for name, info in self._tensors().items()}
        rows, width = sum(self.calibration.lengths), self.dtype.itemsize
        packed = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in decoder_linears(c))
        shapes = decoder_linears(c).values()
        # what a block's forward holds at once, and what a float one keeps of it
        more, widest = self.options.streams - 1, max(i for _, i in shapes)
        activations = rows * width * (14 * c.hidden_size + 5 * c.ffn_width + more * (5 * c.hidden_size + c.ffn_width))
        # H and its factor, or that, the drift and the drift in the inputs' dtype, and some rows; then the last two, a
        # weight in float32, its errors and levels, and what drift moves, three times over
        statistics = widest * (widest * (8 + more * width) + 4 * (1 + more) * ROWS_AT_ONCE)
        solving = max(i * i * (4 + more * width) + o * i * (10 + 10 * more) for o, i in shapes)
        copied = self.dtype != getattr(torch, c.dtype) or self.device.type != "cpu"  # the float block's weights
        floats = more * copied * width * sum(o * i for o, i in shapes) // c.num_hidden_layers
        held = activations + max(statistics, solving, floats)
        memory = int(HOLES * held)
        result = sum(sizes.values())
        disk = result + packed + 2 * self.options.streams * rows * width * c.hidden_size
        samples = self.calibration.samples
        return Outline(rows, len(samples), self.calibration.shortened, memory, disk, result)

    def refuse_beyond(self, free: int) -> None:
        """Raise `CapacityError` where `free` bytes of memory are not enough."""
        needed, rows = self.outline().memory, self.outline().rows
        if needed > free:
            raise CapacityError(
                f"quantizing with {rows:,} calibration rows needs about {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free: use fewer samples, or shorter ones"
            )

    def run(self, progress: Callable[[int], None] = lambda done: None) -> list[LinearError]:
        """Quantize and write; `progress` hears how many linears are done. Returns the error of each linear."""
        keep_heap()
        with Job(self.destination, self._key()) as job:
            return self._run(job, progress)

    def _run(self, job: Job, progress: Callable[[int], None]) -> list[LinearError]:
        state = job.resume()
        if state is None:
            shape = (self.options.streams, sum(self.calibration.lengths), self.config.hidden_size)
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            embed(self.config, Checkpoint.open(self.source), self.calibration, x[0])
            x[1:] = x[0]
            state = State(0, x, [])
            job.note(state, {})
        rows = Rows.of(self.config, self.calibration.lengths, self.calibration.held_out, self.device)
        state = state._replace(x=state.x.to(self.device))
        progress(len(state.errors))
        while state.done < self.config.num_hidden_layers:
            bench = self._bench(state.done, rows, partial(_add, progress, len(state.errors)))
            x = quantize_block(self.config, ops_for(self.device), bench, state.x, rows)
            state = State(state.done + 1, x, state.errors + bench.errors)
            job.note(state, bench.packed)
            trim_heap()
        self._write(job, state.errors)
        return state.errors

    def _bench(self, layer: int, rows: Rows, progress: Callable[[int], None]) -> Bench:
        """The float weights of a block. The files are mapped anew for each: letting go of them frees their pages."""
        checkpoint, prefix = Checkpoint.open(self.source), f"transformer.h.{layer}."
        state = {name: checkpoint.tensor(name) for name in checkpoint.names if name.startswith(prefix)}
        for norm in ("ln_1", "ln_2"):
            name = f"{prefix}{norm}.weight"
            state[name] = state[name].to(self.device, self.dtype)
        asked = self.options
        solver = Solver(asked.quantization, asked.damping, asked.order, asked.drift)
        return Bench(layer, state, asked.method, solver, rows.fitted, progress)

    def _write(self, job: Job, errors: list[LinearError]) -> None:
        """All blocks are done: gather them and what stays float16 into the new checkpoint."""
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
        """How it was done and what it cost, without times: the same for the same work."""
        kept = ("layer", "linear", "error", "rtn_error", "damping")
        calibration = {
            "conversations": len(self.calibration.samples),
            "held_out": self.calibration.held_out,
            "rows": sum(self.calibration.lengths),
            "sha256": self.calibration.digest(),
        }
        linears = [{name: getattr(error, name) for name in kept} for error in errors]
        return {"options": asdict(self.options), "calibration": calibration, "linears": linears}

    def _tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the new checkpoint, in published order."""
        specs = expected_tensors(replace(self.config, quantization=self.options.quantization))
        return {name: TensorInfo(spec.shape, "int32" if spec.packed else "float16") for name, spec in specs.items()}

    def _key(self) -> Mapping[str, object]:
        files = sorted([*self.source.glob("*.safetensors"), *self.source.glob("*.bin")])
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        options = cast("dict[str, object]", asdict(self.options))
        options["drift"] = self.options.drift if self.options.streams > 1 else 0.0  # rounding to nearest knows none
        return options | {"calibration": self.calibration.digest(), "source": stats, "device": self.device.type}


def _refuse_beyond_float16(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """What stays float becomes float16, as published; it must not become infinite on the way."""
    for name in expected_tensors(config):
        if name in checkpoint and name.rpartition(".")[0] not in decoder_linears(config):
            tensor = checkpoint.tensor(name)
            most = float(torch.stack([part.abs().max() for part in pieces(tensor, tensor.dtype)]).max())
            if not most <= MOST_FLOAT16:  # NaN, too
                raise CheckpointError(
                    f"{name} holds {most:g}, beyond the {MOST_FLOAT16:g} of float16, which the published layout keeps "
                    "it in: fine-tune in a narrower range"
                )


def _add(progress: Callable[[int], None], before: int, count: int) -> None:
    progress(before + count)
