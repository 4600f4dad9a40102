"""Convert a published checkpoint to the layout of a target's kernels, tensor by tensor, all of it or nothing.

Files are written in a `PartialFolder`, each entered in a journal once it is on the disk, so that a conversion that was
stopped resumes after the last of them and produces the same bytes. The destination appears by a rename.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvl_kernels.ops import Packer
from qvl_kernels.util import dtype_name
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.journal import COMMAND, Journal
from qvl_runtime.convert.prefetch import prefetch
from qvl_runtime.convert.recipes import ConvertOptions, Recipe, build, check_roundable, recipes
from qvl_runtime.convert.shard_writer import Entry, ShardWriter
from qvl_runtime.convert.source_files import check_files, index_text, small_files, source_file
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.formats.finite import finite_pieces
from qvl_runtime.formats.gptq import GPTQ_TENSORS
from qvl_runtime.formats.host_memory import pieces
from qvl_runtime.formats.layout import is_ignored
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.file_names import INDEXES, SMALL_FILES
from qvl_runtime.weights.files import copy_file
from qvl_runtime.weights.manifest import Manifest, PackedLinear, file_digest, is_converted
from qvl_runtime.weights.packing import source_notes
from qvl_runtime.weights.partial import PartialFolder, check_destination, free_bytes

if TYPE_CHECKING:
    import torch

LOSSLESS = {("float16", "float32"), ("bfloat16", "float32")}
DISK_MARGIN = 64 << 20  # bytes of disk beyond the size of the result


class Estimate(NamedTuple):
    """The result of a conversion, known before it starts."""

    source_bytes: int
    bytes: int  # of the result, approximate
    free: int  # bytes on the destination's disk
    packed: int  # linears
    unpacked: int  # tensors that are stored unchanged
    dtype: str  # of those that are floats


def convert(
    source: Path,
    destination: Path,
    options: ConvertOptions | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Convert the folder `source` to the folder `destination`.

    progress: called with the number of finished bytes of the source. Memory stays below 2 GB whatever the size. Raises
    `CheckpointError` for a source that is not a checkpoint, a destination that exists or is being written, and a full
    disk; `ConfigError` for another model and for options that the target does not support.
    """
    options = options or ConvertOptions()
    job = _Job.open(source, destination, options)
    notes = source_notes(job.checkpoint, job.config)
    estimate = job.estimate()
    with Journal(job.destination, job.key()) as journal:
        missing = estimate.bytes + DISK_MARGIN - journal.bytes - estimate.free
        if missing > 0:
            raise CheckpointError(
                f"{destination} needs {estimate.bytes:,} bytes and its disk has {estimate.free:,} free: make room for "
                f"{missing:,} more, or choose another disk"
            )
        with ThreadPoolExecutor(1) as executor:
            digests = [(path, executor.submit(file_digest, path)) for path in job.checkpoint.paths]
            try:
                job.write(journal, progress)
                manifest = job.manifest(journal, digests, notes)
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        journal.complete(manifest)
    return manifest


def estimate(source: Path, destination: Path, options: ConvertOptions | None = None) -> Estimate:
    """The result that `convert` would have, with the same errors; writes nothing."""
    return _Job.open(source, destination, options or ConvertOptions()).estimate()


class _Job(NamedTuple):
    """One conversion, checked and ready to run."""

    source: Path
    destination: Path
    options: ConvertOptions
    config: ModelConfig
    checkpoint: Checkpoint
    ops: Packer
    dtype: torch.dtype

    @classmethod
    def open(cls, source: Path, destination: Path, options: ConvertOptions) -> _Job:
        import torch

        from qvl_kernels import packing_for

        source, destination = Path(source), Path(destination)
        check_destination(source, destination)
        PartialFolder(destination, {"command": COMMAND}).check_idle()
        if is_converted(source):
            raise CheckpointError(
                f"{source} is converted already: convert its source, or restore that with `qvl convert --to hf`"
            )
        config = ModelConfig.from_folder(source)
        try:
            ops = packing_for(options.target)
        except RuntimeError as fault:
            raise ConfigError(f"target {options.target!r} is not available on this machine: {fault}") from fault
        dtype = getattr(torch, config.dtype if options.dtype == "auto" else options.dtype)
        checkpoint = Checkpoint.open(source, config)
        check_files(checkpoint)
        check_roundable(config, options)
        return cls(source, destination, options, config, checkpoint, ops, dtype)

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    def key(self) -> dict[str, object]:
        """The source files and options that must be equal to resume a conversion."""
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.paths}
        options = {"target": self.options.target, "vision": self.options.vision, "head": self.options.head}
        return {"source": stats, "dtype": self.dtype_name, **options}

    def estimate(self) -> Estimate:
        """Estimate the size of the result from the shapes of the source."""
        stored = {name: self.checkpoint.nbytes(name) for name in self.checkpoint.names}
        all_recipes, size = list(recipes(self.config, self.options)), 0
        for recipe in all_recipes:
            for part in recipe.parts or (recipe.name,):
                elements = self.checkpoint.elements(f"{part}.weight" if recipe.parts else part)
                if recipe.bits is not None:
                    size += elements * (4 * recipe.bits + 1) // 32
                elif recipe.parts:  # scales are stored twice: packed, and as published to restore them
                    size += stored[f"{part}.qweight"] + 2 * stored[f"{part}.scales"]
                else:
                    size += elements * self.dtype.itemsize
        free = free_bytes(self.destination)
        packed = sum(bool(recipe.parts) for recipe in all_recipes)
        return Estimate(sum(stored.values()), size, free, packed, len(all_recipes) - packed, self.dtype_name)

    def write(self, journal: Journal, progress: Callable[[int], None]) -> None:
        """Write every recipe that is not in a finished file yet."""
        writer, all_recipes = ShardWriter(journal.folder, journal.shards), list(self._recipes())
        missing = [recipe for recipe in all_recipes if recipe.name not in journal.done]
        done = sum(map(self._bytes_read, all_recipes)) - sum(map(self._bytes_read, missing))
        progress(done)
        with closing(prefetch(missing, self._built)) as built:
            for recipe, (entries, linears) in built:
                writer.add(recipe.name, entries, linears)
                if writer.full:
                    journal.append(writer.close())
                done += self._bytes_read(recipe)
                progress(done)
        if writer.items:
            journal.append(writer.close())

    def _bytes_read(self, recipe: Recipe) -> int:
        """Bytes of the source that a recipe reads."""
        names = [f"{part}.{kind}" for part in recipe.parts for kind in ("weight", "qweight")] or [recipe.name]
        return sum(self.checkpoint.nbytes(name) for name in names if name in self.checkpoint)

    def _recipes(self) -> Iterator[Recipe]:
        """The recipes of the model, then tensors that it does not read, kept to restore the source."""
        model = [r for r in recipes(self.config, self.options) if r.parts or r.name in self.checkpoint]
        yield from model
        used = {f"{part}.{kind}" for r in model for part in r.parts for kind in _KINDS} | {r.name for r in model}
        yield from (Recipe(name) for name in self.checkpoint.names if name not in used)

    def _built(self, recipe: Recipe) -> tuple[list[Entry], dict[str, PackedLinear]]:
        """The tensors to write for a recipe, and the linears that they form."""
        if not recipe.parts:
            return [self._unchanged(recipe.name)], {}
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

    def _unchanged(self, name: str) -> Entry:
        """A tensor of the source; the floats that the model has in the dtype of the conversion."""
        tensor = self.checkpoint.tensor(name)
        cast = tensor.is_floating_point() and not is_ignored(name, self.config)
        dtype = self.dtype if cast else tensor.dtype
        parts = finite_pieces(name, tensor, dtype) if cast else pieces(tensor, dtype)
        return Entry(name, dtype_name(dtype), tuple(tensor.shape), parts)

    def manifest(self, journal: Journal, digests: Iterable[tuple[Path, Future[str]]], notes: Sequence[str]) -> Manifest:
        """Copy the small files of the source, and describe the whole folder."""
        indexes = {path.name: index_text(self.checkpoint, path) for path in small_files(self.source, INDEXES)}
        companions = {}
        for path in small_files(self.source, SMALL_FILES):
            if path.name not in indexes:
                copy_file(path, journal.folder / path.name)
                companions[path.name] = file_digest(journal.folder / path.name)
        state = [r.name for r in recipes(self.config, self.options) if not r.parts and r.name in self.checkpoint]
        dtypes = (self.checkpoint.info(name).dtype for name in state)
        options = self.options
        return Manifest(
            target=options.target,
            dtype=self.dtype_name,
            vision=options.vision,
            head=options.head,
            sources={path.name: source_file(self.checkpoint, path, digest.result()) for path, digest in digests},
            indexes=indexes,
            companions=companions,
            state=state,
            cast=any(dtype != self.dtype_name and (dtype, self.dtype_name) not in LOSSLESS for dtype in dtypes),
            linears=journal.linears,
            shards=journal.shards,
            notes=list(notes),
        )


_KINDS = ("weight", *GPTQ_TENSORS)


__all__ = ["ConvertOptions", "Estimate", "convert", "estimate"]
