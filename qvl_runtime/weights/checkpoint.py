"""A checkpoint folder in the Hugging Face layout: open its files, check them against config.json, load by mmap."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_runtime.config.checks import read_json
from qvl_runtime.config.model import DTYPES, ModelConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.finite import finite
from qvl_runtime.formats.layout import TensorSpec, expected_tensors, is_ignored
from qvl_runtime.reading.regular_files import is_there
from qvl_runtime.weights.file_names import check_names
from qvl_runtime.weights.hints import few, misfit_hint
from qvl_runtime.weights.names import published_names
from qvl_runtime.weights.shards import Shard, open_shard
from qvl_runtime.weights.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch

_FORMATS = (".safetensors", ".bin")  # in order of preference
_OTHER_SUFFIXES = (".pt", ".pth", ".ckpt")
_USUAL_STEMS = ("model", "pytorch_model")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "adapter_model.bin", "adapter_model.safetensors")


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """An open checkpoint: names, shapes and mapped tensors of all its files. It holds only mappings.

    Tensors stay valid after the checkpoint is gone and must not be written to.
    """

    def __init__(self, folder: Path, shards: dict[str, Shard], files: dict[str, str]) -> None:
        """files: the file of each tensor, by its stored name."""
        names = published_names(files)
        self.folder = folder
        self.renamed = bool(names.note)
        self.notes = [note for note in (names.note, *(shard.note for shard in shards.values())) if note]
        self._shards = shards
        self._stored = names.stored
        self._files = {name: files[stored] for name, stored in names.stored.items()}
        self._specs: dict[str, TensorSpec] = {}  # by `check`

    @classmethod
    def open(cls, folder: Path, config: ModelConfig | None = None) -> Checkpoint:
        """Open the weight files of a folder; with a configuration, also check every name, shape and dtype.

        Raises `CheckpointError` for a missing or damaged file and for missing, unexpected or misshapen weights.
        """
        folder = Path(folder)
        index, paths = _find_files(folder)
        shards = {path.name: open_shard(path) for path in paths}
        files = {name: file for file, shard in shards.items() for name in shard.infos}
        for name, file in index.items():
            if name not in shards[file].infos:
                raise CheckpointError(f"{folder}: the index lists {name} in {file}, which lacks it: fetch both again")
        checkpoint = cls(folder, shards, files | index)
        if config is not None:
            checkpoint.check(config)
        return checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, file by file."""
        return tuple(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(self.folder / name for name in self._shards)

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._files[name]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as stored; 0 where there is none of that name."""
        return self.info(name).nbytes if name in self else 0

    def elements(self, name: str) -> int:
        """Elements of a tensor; 0 where there is none of that name."""
        return math.prod(self.info(name).shape) if name in self else 0

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor as stored."""
        return self._shards[self._files[name]].infos[self._stored[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored: a view of the mapped file, contiguous, on the CPU."""
        return self._shards[self._files[name]].tensor(self._stored[name])

    def restorable(self, file: str) -> bool:
        """Whether a file can be written again byte for byte, with the published names."""
        return self._shards[file].restorable and not self.renamed

    def check(self, config: ModelConfig) -> None:
        """Compare all names, shapes and dtypes with those of `config`; raises one `CheckpointError` for all faults."""
        self._specs = expected = expected_tensors(config)
        missing = [name for name, spec in expected.items() if name not in self and not spec.optional]
        unexpected = [name for name in self.names if name not in expected and not is_ignored(name, config)]
        faults = [self._fault(name, spec) for name, spec in expected.items() if name in self]
        misfits = [fault for fault in faults if fault]
        problems = []
        if missing:
            problems.append(f"lacks {len(missing)} of {len(expected)} weights ({few(missing)})")
        if unexpected:
            where = ", ".join(sorted({self.file(name) for name in unexpected[:3]}))
            problems.append(f"has {len(unexpected)} that config.json does not describe ({few(unexpected)} in {where})")
        if misfits:
            problems.append(f"has {few(misfits)}")
        if problems:
            hint = misfit_hint(self._infos(), missing, unexpected, config)
            raise CheckpointError(f"checkpoint {self.folder} {'; it '.join(problems)}{hint}")

    def load(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        skip: Collection[str] = (),
        on_host: Collection[str] = (),
    ) -> dict[str, torch.Tensor]:
        """Load all tensors of a checkpoint opened with `config`: {published name: tensor} in `dtype` on `device`.

        Packed integers and `g_idx` stay int32; GPTQ scales keep their dtype unless `dtype` is float32, which holds them
        exactly. A tensor that already has that dtype and device is the mapped file itself: it is not copied and must
        not be written to. Others are converted one by one, so that memory peaks at most one tensor above its final
        size. A tied `lm_head.weight` is the embedding; an optional tensor that is not stored is absent. Linears in
        `skip` are left out; tensors in `on_host` stay in the host's memory, whatever the device. Raises
        `CheckpointError` for a value that is not finite in a tensor that is copied, or becomes so in `dtype`.
        """
        import torch

        state = {}
        for name in self.names:
            spec = self._specs.get(name)
            if spec is None or name.rpartition(".")[0] in skip:  # known and harmless, or `open` would have raised
                continue
            tensor = self.tensor(name)
            as_stored = spec.packed or (name.endswith(".scales") and dtype is not torch.float32)
            target = "cpu" if name in on_host else device
            state[name] = finite(name, tensor.to(device=target, dtype=tensor.dtype if as_stored else dtype), tensor)
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        return state

    def _infos(self) -> dict[str, TensorInfo]:
        return {name: self.info(name) for name in self.names}

    def _fault(self, name: str, spec: TensorSpec) -> str:
        info, file = self.info(name), self.file(name)
        if info.shape != spec.shape:
            return f"{name} of shape {info.shape} in {file}; expected {spec.shape}"
        dtypes = DTYPES if not spec.packed else ("int32", "int64") if name.endswith(".g_idx") else ("int32",)
        return "" if info.dtype in dtypes else f"{name} of dtype {info.dtype} in {file}; expected {' or '.join(dtypes)}"


def load_state(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    skip: Collection[str] = (),
    on_host: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """`Checkpoint.load` of the folder that fits `config`."""
    return Checkpoint.open(folder, config).load(config, dtype, device, skip, on_host)


def _find_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The index's {tensor: file} (empty without one) and the weight files, in the first format that is found."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with config.json and the weights")
    for suffix in _FORMATS:
        indexes = sorted(folder.glob(f"*{suffix}.index.json"))
        files = sorted(path for path in folder.glob(f"*{suffix}") if path.name not in _NOT_WEIGHTS)
        usual = [path for path in files if path.stem in _USUAL_STEMS]
        if usual or (len(files) == 1 and not indexes):
            return {}, [usual[0] if usual else files[0]]
        if indexes:
            return _read_index(indexes)
        if files:
            raise CheckpointError(
                f"{folder} holds {len(files)} {suffix} files ({few([path.name for path in files])}) and no index; "
                f"expected model{suffix}.index.json with them, or one file"
            )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_SUFFIXES)
    hint = f" (a state_dict in {others[0]!r} is read as pytorch_model.bin: rename it)" if others else ""
    raise CheckpointError(
        f"{folder} holds no weights; expected model.safetensors, or shards with their index, or .bin{hint}"
    )


def _read_index(indexes: list[Path]) -> tuple[dict[str, str], list[Path]]:
    path = indexes[0]
    if len(indexes) > 1:
        names = few([index.name for index in indexes])
        raise CheckpointError(f"{path.parent} holds {len(indexes)} indexes ({names}); expected one")
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'; expected an index as transformers writes it")
    check_names(weight_map.values(), ("*",), f"{path}, weight_map,")
    files = sorted(set(weight_map.values()))
    shards = [path.parent / file for file in files]
    absent = [shard.name for shard in shards if not is_there(shard)]
    if absent:
        raise CheckpointError(f"{path.parent} lacks {len(absent)} of {len(files)} shards ({few(absent)}): fetch them")
    return weight_map, shards
