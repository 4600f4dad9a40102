"""Any rank of a tensor-parallel model but the first: it holds its share of the decoder and does what it is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from qvl_kernels import ops_for
from qvl_kernels.affinity import unbind
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import GroupError, QVLError
from qvl_runtime.model.language import Decoder, Layout
from qvl_runtime.model.linear import LinearBuilder
from qvl_runtime.model.rotary import positions_of
from qvl_runtime.parallel.group import Group, arrival, meeting_place
from qvl_runtime.parallel.leader import CopyBlock, Forward, Logits, MakeCache, Settings
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.weights.loader import load_weights, model_config
from qvl_runtime.weights.shares import Share

EMBEDDING = "transformer.wte.weight"


class Follower:
    """A share of a decoder and of its KV cache."""

    def __init__(self, config: ModelConfig, settings: Settings, group: Group) -> None:
        """Load the share. Raises `QVLError` like an engine."""
        self.config, self.group, self.device = config, group, group.device
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.share = Share(config, settings.rank, settings.ranks)
        weights = load_weights(Path(settings.folder), config, self.dtype, self.device, share=self.share)
        weights.state[EMBEDDING] = torch.empty(0, config.hidden_size, dtype=self.dtype, device=self.device)
        self.ops = ops_for(self.device)
        linears = LinearBuilder(self.ops, weights.state, settings.precision, weights.packed, ranks=group)
        self.decoder = Decoder(config, linears)
        self.cache: KVCache | None = None

    @torch.inference_mode()
    def obey(self, command: object) -> None:
        """Do one command of the first rank."""
        if isinstance(command, MakeCache):
            self.cache = KVCache(
                self.config, command.tokens, command.dtype, self.device, prefixes=False, heads=self.share.heads
            )
            self.group.meet()
        elif isinstance(command, Logits):
            hidden = self._receive(self.dtype, command.rows, self.config.hidden_size)
            self.group.collect(self.decoder.logits(hidden), self.share.vocabulary)
        elif self.cache is not None and isinstance(command, CopyBlock):
            self.cache.copy_block(command.source, command.target)
        elif self.cache is not None and isinstance(command, Forward):
            self._forward(command, self.cache)
        else:
            raise GroupError(f"a command was not expected: {type(command).__name__}")

    def _forward(self, command: Forward, cache: KVCache) -> None:
        rows = command.frequencies[0]
        positions, slots = (self._receive(torch.int64, rows) for _ in range(2))
        tables = self._receive(torch.int64, *command.tables)
        frequencies = self._receive(torch.float32, *command.frequencies)
        x = self._receive(self.dtype, rows, self.config.hidden_size)
        at = positions_of(self.config, positions, frequencies, self.ops)
        layout = Layout(slots, tables, command.query_starts, command.context_lens)
        self.decoder.forward(x, at, layout, cache.layers)

    def _receive(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.group.broadcast(torch.empty(shape, dtype=dtype, device=self.device))


def main() -> NoReturn:
    """Load the share that a line on standard input describes, and do what comes until the first rank ends."""
    settings = Settings(**json.loads(sys.stdin.readline()))
    device = torch.device(settings.device)
    if device.type == "cpu":
        unbind()  # before a thread of the kernels is started
    torch.set_num_threads(settings.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = meeting_place(settings.ranks, settings.port)
        store.set(arrival(settings.rank), "")
        group = Group(store, settings.rank, settings.ranks, device)
        follower = Follower(model_config(Path(settings.folder)), settings, group)
        while True:
            follower.obey(group.command())
    except GroupError:  # the first rank has ended, and says itself why
        code = 0
    except QVLError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        code = 2
    sys.stderr.flush()
    os._exit(code)  # torch's threads wait for a group that is gone


if __name__ == "__main__":
    main()
