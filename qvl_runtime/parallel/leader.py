"""The first rank of a tensor-parallel model: it schedules, encodes images, samples, and tells the others what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.reference import Packed, Precision
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError, GroupError, QVLError
from qvl_runtime.model.language import LayerCache, Observer, unobserved
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.parallel.group import START, Group, arrival, check_free, leave, meeting_place
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.weights.shares import Share

PROGRAM = "from qvl_runtime.parallel.follower import main; main()"


@dataclass(frozen=True)
class Settings:
    """What a follower needs to load its share."""

    folder: str
    rank: int
    ranks: int
    port: int
    device: str
    dtype: str
    precision: Precision
    threads: int


class MakeCache(NamedTuple):
    """Allocate a KV cache."""

    tokens: int
    dtype: torch.dtype


class CopyBlock(NamedTuple):
    """Copy a block of the cache."""

    source: int
    target: int


class Forward(NamedTuple):
    """Compute a step of n tokens; positions, slots, block tables, frequencies and embeddings follow."""

    tables: tuple[int, int]  # the shape of the block tables
    frequencies: tuple[int, int]  # n, half of the rotated channels
    query_starts: list[int]
    context_lens: list[int]


class Logits(NamedTuple):
    """Compute the rank's logits of some hidden states, which follow."""

    rows: int


class Ranks:
    """The processes of a model, this one included. Used by one thread at a time.

    A step is computed by all or by none: an exception in the middle of one, such as Ctrl-C, ends the group.
    """

    def __init__(self, config: ModelConfig, folder: Path, ranks: int, device: torch.device, dtype: str, precision: Any):
        """Start the other processes, which load their shares. Raises `ConfigError` for what cannot be split."""
        check_free()
        self.share = Share(config, 0, ranks)
        first = device.index or 0
        if device.type == "cuda" and first + ranks > torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel is {ranks} from {device} on; this machine has {torch.cuda.device_count()} GPUs"
            )
        store = meeting_place(ranks)
        self._threads = max(1, torch.get_num_threads() // ranks)
        self._processes: list[subprocess.Popen[str]] = []
        self._end = weakref.finalize(self, _end, self._processes)
        for rank in range(1, ranks):
            where = f"cuda:{first + rank}" if device.type == "cuda" else "cpu"
            settings = Settings(str(folder), rank, ranks, store.port, where, dtype, precision, self._threads)
            self._processes.append(_start(settings))
        try:
            self._wait_for_all(store)
            self.group = Group(store, 0, ranks, device)
        except BaseException:
            self._end()
            raise
        self.ended = ""

    def gather(self, x: Tensor) -> Tensor:
        """See `Group.gather`."""
        return self.group.gather(x)

    def tell(self, command: Any, *tensors: Tensor, replies: bool = False) -> None:
        """Send a command and its tensors; `replies`: wait until every rank has done it.

        Raises `GroupError`, or the error of a rank that could not load its share.
        """
        if self.ended:
            raise GroupError(self.ended)
        try:
            self.group.command(command)
            for tensor in tensors:
                self.group.broadcast(tensor.contiguous())
            if replies:
                self.group.meet()
        except GroupError as error:
            self.end(str(error))
            raise (self._reported() or error) from None

    @contextmanager
    def sharing_cores(self) -> Iterator[None]:
        """Compute with no more threads than each other process, while all compute; images are encoded with all."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def end(self, why: str) -> None:
        """End the other processes; what is asked of them from now on is refused with the reason."""
        if not self.ended:
            self.ended = why
            self._end()

    def _wait_for_all(self, store: Any) -> None:
        """Wait until every rank has come to the store. Raises `GroupError` if one ends before, or takes too long."""
        keys = [arrival(rank) for rank in range(1, self.share.ranks)]
        deadline = time.monotonic() + START.total_seconds()
        while not store.check(keys):
            ended = any(process.poll() is not None for process in self._processes)
            if ended or time.monotonic() > deadline:
                what = "has ended as it started" if ended else f"has not come within {START.total_seconds():.0f} s"
                raise GroupError(f"one of the {self.share.ranks} processes of this model {what}: see above why")
            time.sleep(0.02)

    def _reported(self) -> QVLError | None:
        for process in self._processes:
            line = process.communicate()[0]
            if line.strip():
                return ConfigError(json.loads(line.splitlines()[-1])["error"])
        return None


class ParallelModel(QwenVL):
    """A `QwenVL` whose decoder is split among ranks; of this process, the first."""

    def __init__(
        self,
        ranks: Ranks,
        config: ModelConfig,
        state: MutableMapping[str, Tensor],
        precision: Precision,
        packed: Mapping[str, Packed],
        embedding_on_host: bool,
    ) -> None:
        """Build the model from the first rank's share of the weights."""
        super().__init__(config, state, precision, packed, embedding_on_host, ranks)
        self.ranks = ranks
        self.kernels["decoder"] = f"split among {ranks.share.ranks} processes, no graphs"

    @torch.inference_mode()
    def forward(self, step: Step, caches: Sequence[LayerCache], observe: Observer = unobserved) -> Tensor:
        """Return the hidden states [n, D] of a step; its keys and values are written to the caches of all ranks."""
        x = self.embed(step) if step.inputs_embeds is None else step.inputs_embeds
        layout = step.layout
        starts, lengths = list(layout.query_starts), list(layout.context_lens)
        command = Forward(_pair(layout.block_tables), _pair(step.frequencies), starts, lengths)
        try:
            self.ranks.tell(command, step.positions, layout.slots, layout.block_tables, step.frequencies, x)
            with self.ranks.sharing_cores():
                return super().forward(replace(step, inputs_embeds=x), caches, observe)
        except BaseException as error:
            self.ranks.end(f"the processes of this model were ended by {type(error).__name__} in a step: make it again")
            raise

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [m, D] to logits [m, vocab]."""
        try:
            self.ranks.tell(Logits(len(hidden)), hidden)
            with self.ranks.sharing_cores():
                logits = self.ranks.group.collect(super().logits(hidden), self.ranks.share.vocabulary)
        except BaseException as error:
            self.ranks.end(f"the processes of this model were ended by {type(error).__name__} in a step: make it again")
            raise
        assert logits is not None  # this is the first rank
        return logits


class ParallelCache(KVCache):
    """A KV cache whose blocks every rank has, each for its own heads."""

    def __init__(self, ranks: Ranks, config: ModelConfig, tokens: int, dtype: torch.dtype, prefixes: bool) -> None:
        """Allocate it on all ranks."""
        super().__init__(config, tokens, dtype, ranks.group.device, prefixes, ranks.share.heads)
        self._ranks = ranks
        ranks.tell(MakeCache(tokens, dtype), replies=True)

    def copy_block(self, source: int, target: int) -> None:
        """Copy the content of a block, in every layer and on every rank."""
        self._ranks.tell(CopyBlock(source, target))
        super().copy_block(source, target)


def _pair(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _start(settings: Settings) -> subprocess.Popen[str]:
    """Start a follower. It finds the package where this process does, and reports an error as a line of JSON."""
    code = f"import sys; sys.path[:] = {sys.path!r}; {PROGRAM}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(settings)) + "\n")
    process.stdin.flush()
    return process


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
    leave()
