"""A published checkpoint to one in the layout of a target's kernels, tensor by tensor, all of it or nothing.

Work goes on in `.NAME.partial` beside the destination: whole files, each noted in a journal when it is on the disk, so
that a conversion that was stopped goes on after the last of them and makes the same bytes. The destination appears by
a rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.journal import Journal
from qvl_runtime.convert.prefetch import ahead
from qvl_runtime.convert.recipes import ConvertOptions, Recipe, build, recipes
from qvl_runtime.convert.shard_writer import Entry, ShardWriter
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.formats.gptq import GPTQ_TENSORS
from qvl_runtime.formats.host_memory import pieces
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.manifest import (
    Manifest,
    PackedLinear,
    ShardRecord,
    SourceFile,
    file_digest,
    is_converted,
)
from qvl_runtime.weights.partial import check_destination, free_bytes
from qvl_runtime.weights.tensor_file import CODES, Written, header_of, read_header

if TYPE_CHECKING:
    import torch

SMALL_FILES = ("*.json", "*.tiktoken")
LOSSLESS = {("float16", "float32"), ("bfloat16", "float32")}
SPARE = 64 << 20  # bytes of disk beyond what the result takes


class Outline(NamedTuple):
    """What a conversion would do, known before it starts."""

    source_bytes: int
    bytes: int  # about, of the result
    free: int  # of the destination's disk
    packed: int  # linears
    unpacked: int  # tensors that stay as they are
    dtype: str


def convert(
    source: Path,
    destination: Path,
    options: ConvertOptions | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Convert `source` to the folder `destination`; `progress` hears how many bytes of the source are done.

    Memory stays below 2 GB whatever the size. Raises `CheckpointError` for a source that is no checkpoint, a
    destination that exists, and a full disk; `ConfigError` for another model and for what a target cannot hold.
    """
    options = options or ConvertOptions()
    job = _Job.open(source, destination, options)
    outline = job.outline()
    with Journal(job.destination, job.key()) as journal:
        missing = outline.bytes + SPARE - journal.bytes - outline.free
        if missing > 0:
            raise CheckpointError(
                f"{destination} needs {outline.bytes:,} bytes and its disk has {outline.free:,} free: make room for "
                f"{missing:,} more, or choose another disk"
            )
        with ThreadPoolExecutor(1) as beside:
            digests = [(path, beside.submit(file_digest, path)) for path in job.checkpoint.paths]
            try:
                job.write(journal, progress)
                manifest = job.manifest(journal, digests)
            except BaseException:
                beside.shutdown(wait=False, cancel_futures=True)
                raise
        journal.complete(manifest)
    return manifest


def outline(source: Path, destination: Path, options: ConvertOptions | None = None) -> Outline:
    """What `convert` would do, with the same errors; writes nothing."""
    return _Job.open(source, destination, options or ConvertOptions()).outline()


class _Job(NamedTuple):
    source: Path
    destination: Path
    options: ConvertOptions
    config: ModelConfig
    checkpoint: Checkpoint
    ops: ModuleType
    dtype: torch.dtype

    @classmethod
    def open(cls, source: Path, destination: Path, options: ConvertOptions) -> _Job:
        import torch

        from qvl_kernels import packing_for

        source, destination = Path(source), Path(destination)
        check_destination(source, destination)
        if is_converted(source):
            raise CheckpointError(f"{source} is converted already: convert its source, or go back with --to hf first")
        config = ModelConfig.from_folder(source)
        try:
            ops = packing_for(options.target)
        except RuntimeError as fault:
            raise ConfigError(f"target {options.target!r} cannot be converted for here: {fault}") from fault
        dtype = getattr(torch, config.dtype if options.dtype == "auto" else options.dtype)
        return cls(source, destination, options, config, Checkpoint.open(source, config), ops, dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def key(self) -> dict[str, object]:
        """What must be the same for a conversion to be gone on with."""
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.paths}
        chosen = [self.options.target, self.dtype_name, self.options.vision, self.options.head]
        return {"source": stats, "options": chosen}

    def outline(self) -> Outline:
        stored = {name: self.checkpoint.nbytes(name) for name in self.checkpoint.names}
        found, size = list(recipes(self.config, self.options)), 0
        for recipe in found:
            width = self.dtype.itemsize
            for part in recipe.parts or (recipe.name,):
                held = self.checkpoint.elements(f"{part}.weight" if recipe.parts else part)
                if recipe.bits is not None:
                    size += held * (4 * recipe.bits + 1) // 32
                elif recipe.parts:  # once as packed, and scales and zero points again for the way back
                    size += stored[f"{part}.qweight"] + 2 * stored[f"{part}.scales"]
                else:
                    size += held * width
        free = free_bytes(self.destination)
        packed = sum(bool(recipe.parts) for recipe in found)
        return Outline(sum(stored.values()), size, free, packed, len(found) - packed, self.dtype_name)

    def write(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Every recipe that no whole file holds yet."""
        writer, found = ShardWriter(journal.folder, journal.shards), list(self._recipes())
        missing = [recipe for recipe in found if recipe.name not in journal.done]
        done = sum(self._read_by(recipe) for recipe in found) - sum(self._read_by(recipe) for recipe in missing)
        progress(done)
        with closing(ahead(missing, self._made)) as made:
            for recipe, (entries, linears) in made:
                writer.add(recipe.name, entries, linears)
                if writer.full:
                    journal.note(writer.close())
                done += self._read_by(recipe)
                progress(done)
        if writer.items:
            journal.note(writer.close())

    def _read_by(self, recipe: Recipe) -> int:
        """Bytes of the source."""
        read = [f"{part}.{kind}" for part in recipe.parts for kind in ("weight", "qweight")] or [recipe.name]
        return sum(self.checkpoint.nbytes(name) for name in read if name in self.checkpoint)

    def _recipes(self) -> Iterator[Recipe]:
        """Those of the model, then tensors that nothing reads, which come along for the way back."""
        model = [r for r in recipes(self.config, self.options) if r.parts or r.name in self.checkpoint]
        yield from model
        used = {f"{part}.{kind}" for r in model for part in r.parts for kind in _KINDS} | {r.name for r in model}
        yield from (Recipe(name) for name in self.checkpoint.names if name not in used)

    def _made(self, recipe: Recipe) -> tuple[list[Entry], dict[str, PackedLinear]]:
        """What to write of a recipe, and the linears that it makes."""
        if not recipe.parts:
            return [self._as_it_is(recipe.name)], {}
        entries, linears = [], {}
        target, rounded = self.options.target, recipe.bits is not None
        for name, packed, parts in build(recipe, self.checkpoint, self.config, self.ops):
            entries += [Entry.of(f"{name}.{target}.{kind}", tensor) for kind, tensor in packed.tensors.items()]
            if not rounded:
                entries += self._published_helpers(parts)
            linears[name] = PackedLinear(packed.layout, list(packed.tensors), packed.fields, list(parts), rounded)
        return entries, linears

    def _published_helpers(self, parts: Sequence[str]) -> list[Entry]:
        """Scales, zero points and the like of GPTQ linears: a packed layout cannot restore these bit for bit."""
        stored = (f"{part}.{kind}" for part in parts for kind in GPTQ_TENSORS if kind != "qweight")
        tensors = {name: self.checkpoint.tensor(name) for name in stored if name in self.checkpoint}
        return [Entry.of(name, t)._replace(parts=pieces(t, t.dtype)) for name, t in tensors.items()]

    def _as_it_is(self, name: str) -> Entry:
        """A tensor of the source, floats as the dtype that was chosen."""
        tensor = self.checkpoint.tensor(name)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return Entry(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), pieces(tensor, dtype))

    def manifest(self, journal: Journal, digests: Iterable[tuple[Path, Future[str]]]) -> Manifest:
        companions = {}
        indexes = {path.name: path.read_text(encoding="utf-8") for path in self.source.glob("*.index.json")}
        for path in (p for pattern in SMALL_FILES for p in sorted(self.source.glob(pattern))):
            if path.name not in indexes:
                shutil.copyfile(path, journal.folder / path.name)
                companions[path.name] = file_digest(journal.folder / path.name)
        state = [r.name for r in recipes(self.config, self.options) if not r.parts and r.name in self.checkpoint]
        infos = (self.checkpoint.info(name).dtype for name in state)
        options = self.options
        return Manifest(
            target=options.target,
            dtype=self.dtype_name,
            vision=options.vision,
            head=options.head,
            sources={path.name: self._source_file(path, digest.result()) for path, digest in digests},
            indexes=indexes,
            companions=companions,
            state=state,
            cast=any(own != self.dtype_name and (own, self.dtype_name) not in LOSSLESS for own in infos),
            linears=journal.linears,
            shards=journal.shards,
        )

    def _source_file(self, path: Path, sha256: str) -> SourceFile:
        if path.suffix == ".safetensors":
            return SourceFile(path.stat().st_size, sha256, read_header(path).decode(), path.name, True)
        tensors, at = {}, 0
        for name in (name for name in self.checkpoint.names if self.checkpoint.file(name) == path.name):
            info, size = self.checkpoint.info(name), self.checkpoint.nbytes(name)
            tensors[name] = Written(CODES[info.dtype], info.shape, at, at + size, "")
            at += size
        restored = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
        return SourceFile(path.stat().st_size, sha256, header_of(tensors).decode(), restored, False)


_KINDS = ("weight", *GPTQ_TENSORS)


__all__ = ["ConvertOptions", "Outline", "ShardRecord", "convert", "outline"]
