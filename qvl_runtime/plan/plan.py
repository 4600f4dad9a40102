"""What a model needs of memory and what it can do at best, from its configuration alone: nothing is loaded.

The sum is weights + KV cache + features of images + workspace, beside what the process or the driver takes anyway.
Workspace is what one step of `max_step_tokens` rows holds at its widest point, or the visual tower with the images
that it encodes together. Logits are one row's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.config.checks import require_choice
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CapacityError
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.model.cache_layout import BLOCK_SIZE, bytes_per_token
from qvl_runtime.plan.gpus import Machine
from qvl_runtime.plan.sizes import images_at_once, weight_bytes
from qvl_runtime.weights.manifest import Manifest, is_converted

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
FAULT = 64 << 10  # bytes that Linux brings in where one of a mapped file is read
COMPILED = 9 << 16  # bytes of code that torch's 16-bit GEMMs keep for a shape of weight and a number of rows
# The tower's linears of different shapes, by the rows that they meet.
PATCH_LINEARS = ("conv1", "in_proj", "out_proj", "c_fc", "c_proj", "attn_pool.kv_proj", "attn_pool.attn.in_proj")
QUERY_LINEARS = ("attn_pool.attn.out_proj", "proj")


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user decides, and the plan shows the price of."""

    dtype: str = "auto"
    vision: str = "keep"  # or "int8"
    head: str = "keep"  # or "int8", "int4"
    kv: str = "auto"  # or "int8"
    embedding_on_host: bool = False  # GPU: rows are fetched from the host's mapped file
    step_tokens: int = 1024  # rows that a step computes at most
    mapped: tuple[str, ...] = ("vision", "embedding")  # CPU: parts that are pages of a file until they are read

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, ("auto", *WIDTHS))
        require_choice("vision", self.vision, ("keep", "int8"))
        require_choice("head", self.head, ("keep", "int8", "int4"))
        require_choice("kv", self.kv, ("auto", "int8"))


def choices_of(folder: Path, dtype: str, precision: str = "exact", kv: str = "auto") -> Choices:
    """What a checkpoint folder holds, and what an engine makes of it: a fast one rounds vision and head itself."""
    fast = "int8" if precision == "fast" else "keep"
    made = Manifest.read(folder) if is_converted(folder) else None
    vision, head = (made.vision, made.head) if made is not None else ("keep", "keep")
    chosen = Choices(dtype, fast if vision == "keep" else vision, fast if head == "keep" else head, kv)
    rounds = precision == "fast" and vision == "keep"
    return replace(chosen, mapped=("embedding",)) if rounds else chosen


class Load(NamedTuple):
    """What is asked of the model at its worst moment."""

    tokens: int  # in the KV cache, of all requests together
    prompt: int  # tokens that are computed in steps of many; the rest are generated one by one
    images: int = 0  # whose features are kept


class Peak(NamedTuple):
    """Bytes at the worst moment, by what they are for."""

    vision: int
    language: int
    embedding: int
    head: int
    kv: int
    features: int
    workspace: int
    reserved: int

    @property
    def total(self) -> int:
        return sum(self)


class Room(NamedTuple):
    """What fits beside the weights."""

    tokens: int
    images: int


class Plan:
    """The needs of one model with some choices, on a kind of device: "cpu" or "cuda"."""

    def __init__(self, config: ModelConfig, choices: Choices | None = None, device: str = "cpu") -> None:
        self.config, self.choices, self.device = config, choices or Choices(), device
        self.dtype = config.dtype if self.choices.dtype == "auto" else self.choices.dtype
        self.width = WIDTHS[self.dtype]
        self.weights = weight_bytes(config, self.width, self.choices.vision, self.choices.head)

    @property
    def together(self) -> int:
        """Pictures that go through the tower in one pass."""
        return images_at_once(self.config.visual, self.width, self.device)

    @property
    def kv_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        import torch

        return bytes_per_token(self.config, getattr(torch, "int8" if self.choices.kv == "int8" else self.dtype))

    @property
    def kv_per_image(self) -> int:
        """Of the tokens that an image takes in a prompt, start and end included."""
        return self.config.visual.span * self.kv_per_token

    @property
    def feature_bytes(self) -> int:
        """Of one image, kept so that it need not be encoded again."""
        return self.config.visual.n_queries * self.config.hidden_size * self.width

    def peak(self, load: Load, machine: Machine | None = None) -> Peak:
        """Memory at the worst moment of a load.

        On a CPU weights may be pages of a file, there when they were read: little tower without an image, and of the
        embedding the rows of the tokens, in the pieces that the system reads.
        """
        parts = dict(self.weights)
        if self.device == "cpu":
            parts["vision"] = self._tower(bool(load.images))
            if "embedding" in self._mapped and parts["head"]:  # else they are tied, and the head reads it all
                parts["embedding"] = min(parts["embedding"], load.prompt * FAULT)
        elif self.choices.embedding_on_host:
            parts["embedding"] = 0
        return Peak(
            **parts,
            kv=self._kv(load.tokens),
            features=load.images * self.feature_bytes,
            workspace=self._workspace(load),
            reserved=0 if machine is None else machine.reserved,
        )

    @property
    def _mapped(self) -> tuple[str, ...]:
        """Parts that are pages of a file: not where all floats are made others at load."""
        return self.choices.mapped if self.dtype == self.config.dtype else ()

    def _tower(self, used: bool) -> int:
        """Bytes of the tower that a CPU has in memory, `used` or not.

        The resampler's queries are projected at load, and their third of a matrix stays beside the other two; the last
        matrix is stored transposed, and turned at load where it stays float. Positions are resized to the grid.
        """
        v = self.config.visual
        own, matrix = self.weights["vision"], v.output_dim**2 * self.width
        made = matrix + v.num_patches * (v.width + v.output_dim) * self.width
        if "vision" not in self._mapped:
            return own + made
        turned = matrix if self.choices.vision == "keep" else 0
        return (own if used else turned) + turned + made

    def room(self, machine: Machine) -> Room:
        """How many tokens, and how many images with their tokens, fit beside the weights at a full step."""
        empty = self.peak(Load(0, self.choices.step_tokens, 1), machine)
        if self.device == "cpu":
            empty = empty._replace(embedding=self.weights["embedding"])
        free = max(0, machine.memory - empty.total)
        return Room(free // self.kv_per_token, free // (self.kv_per_image + self.feature_bytes))

    def bytes_read_per_token(self, context: int) -> int:
        """What generating one token reads: the decoder, the head, and the KV cache of its context."""
        return self.weights["language"] + self._head_read + context * self.kv_per_token

    @property
    def _head_read(self) -> int:
        return self.weights["head"] or self.weights["embedding"]  # tied: the table is the head

    def bound_tokens_per_s(self, machine: Machine, context: int) -> float | None:
        """The most that one request can get, if reading memory were all: a bound, not a forecast."""
        return None if machine.bandwidth is None else machine.bandwidth / self.bytes_read_per_token(context)

    def compiled(self, load: Load) -> int:
        """What a CPU compiles while it runs, and keeps: oneDNN's code for products of dense weights in 16 bits."""
        from qvl_kernels.cpu.dense import in_tiles

        if self.device != "cpu" or self.width == 4 or in_tiles(self.dtype):
            return 0
        c, v, step = self.config, self.config.visual, self.choices.step_tokens
        numbers = 0
        if c.quantization is None:
            numbers += len({*decoder_linears(c).values()}) * _sizes(load.prompt, step)
        if load.images and self.choices.vision == "keep":
            passes = load.images * v.num_patches, self.together * v.num_patches
            of_queries = load.images * v.n_queries, self.together * v.n_queries
            numbers += len(PATCH_LINEARS) * _sizes(*passes) + len(QUERY_LINEARS) * _sizes(*of_queries)
        return numbers * COMPILED

    def _kv(self, tokens: int) -> int:
        """Of so many tokens, in blocks, and of one block that is always there. On a CPU in whole pages."""
        from qvl_kernels.memory import touched

        blocks, tensors = -(-tokens // BLOCK_SIZE), 2 * self.config.num_hidden_layers
        block = BLOCK_SIZE * self.kv_per_token // tensors
        there = touched(blocks * block, block) if self.device == "cpu" else blocks * block
        return tensors * (there + block)

    def _workspace(self, load: Load) -> int:
        """The most that a step holds at once beside weights and caches: in attention, in an MLP, or in the tower.

        What is counted for each row is what lives at the widest line of `Block` in `model/language.py`, and for each
        patch that of `VisionBlock` in `model/vision.py`.
        """
        c, rows = self.config, min(load.prompt, self.choices.step_tokens)
        hidden, ffn = c.hidden_size, c.ffn_width
        attention = 8 * hidden  # residual, normed; q | k | v, q rotated, context, projected
        mlp = 4 * hidden + 3 * ffn  # residual before and after, normed twice; up | gate, their product
        if self.device == "cpu":
            mlp += ffn if c.quantization is None else 0  # up and gate are two products, put side by side
            mlp += max(hidden, ffn)  # the input of a product as its kernel lays it out, kept until the next
        tables = 4 * (2 * c.rotary_dim + c.rotary_dim // 2)  # cos, sin and frequencies, float32
        decoder = rows * (self.width * max(attention, mlp) + tables)
        v, many = c.visual, min(load.images, self.together)
        patch = 3 * v.width + 2 * v.mlp_width  # residual, what attention adds, their sum; before and after GELU
        resampled = v.width + 4 * v.output_dim  # patches, projected, keys with positions, keys, values
        pixels = 4 * 3 * v.image_size**2
        tower = many * (v.num_patches * self.width * max(patch, resampled) + pixels)
        logits = c.vocab_size * (self.width + 4)  # one row, and once more in float32
        return max(decoder, tower) + logits + self.compiled(load)


def _sizes(rows: int, at_once: int) -> int:
    """With how many different numbers of rows a CPU multiplies, where `rows` come in passes of so many."""
    from qvl_kernels.cpu.dense import step_sizes

    last = rows % at_once
    return len({*(step_sizes(at_once) if rows >= at_once else ()), *(step_sizes(last) if last else ())})


def refuse(plan: Plan, load: Load, machine: Machine) -> None:
    """Raise `CapacityError` where a load does not fit a machine, with the numbers and the choices that would do."""
    peak = plan.peak(load, machine)
    if peak.total <= machine.memory:
        return
    weights = peak.vision + peak.language + peak.embedding + peak.head
    ways = ways_to_fit(plan, load, machine)
    out = f"it fits with {ways[0][0]} ({_gib(ways[0][1].total)})" if ways else "use the Int4 checkpoint or more memory"
    raise CapacityError(
        f"{machine.name} has {_gib(machine.memory)} of memory; the model needs {_gib(peak.total)} "
        f"({_gib(weights)} of weights, {_gib(peak.kv)} of KV cache for {load.tokens} tokens, {_gib(peak.workspace)} of "
        f"workspace): {out}; qvl plan says more"
    )


def ways_to_fit(plan: Plan, load: Load, machine: Machine) -> list[tuple[str, Peak]]:
    """Choices that make a load fit, the least first, each with its peak; empty where it fits as it is or never."""
    if plan.peak(load, machine).total <= machine.memory:
        return []
    steps: list[tuple[str, dict[str, str | bool]]] = [
        ("an int8 KV cache", {"kv": "int8"}),
        ("an int8 visual tower", {"vision": "int8"}),
        ("an int8 head", {"head": "int8"}),
        ("the embedding on the host", {"embedding_on_host": True}),
    ]
    if plan.device == "cpu":
        steps.pop()  # it is there anyway
    chosen, words, found = plan.choices, [], []
    for word, change in steps:
        chosen = replace(chosen, **change)  # type: ignore[arg-type]
        words.append(word)
        peak = Plan(plan.config, chosen, plan.device).peak(load, machine)
        if peak.total <= machine.memory:
            found.append((", ".join(words), peak))
    return found[:1]


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
