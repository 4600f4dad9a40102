"""The memory that a model needs and the speed it can reach, from its configuration alone: nothing is loaded.

The sum is weights + KV cache + image features + workspace, plus what the process or the driver needs anyway. Workspace
is what one step of `max_step_tokens` tokens holds at its widest point, or the vision encoder with the images that it
encodes together. Logits are counted for one token.
"""

from __future__ import annotations

from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.model.cache_layout import BLOCK_SIZE, bytes_per_token
from qvl_runtime.plan.gpus import Device
from qvl_runtime.plan.options import ITEM_SIZE, Capacity, Peak, PlanOptions, Workload
from qvl_runtime.plan.sizes import images_at_once, weight_bytes

READAHEAD = 64 << 10  # bytes that Linux brings in when one byte of a mapped file is read
COMPILED = 9 << 16  # bytes of code that torch's 16-bit GEMMs keep per weight shape and number of rows
# The vision encoder's linears of different shapes, by the rows that they meet.
PATCH_LINEARS = ("conv1", "in_proj", "out_proj", "c_fc", "c_proj", "attn_pool.kv_proj", "attn_pool.attn.in_proj")
QUERY_LINEARS = ("attn_pool.attn.out_proj", "proj")


class Plan:
    """The needs of one model with some options, on a kind of device."""

    def __init__(self, config: ModelConfig, options: PlanOptions | None = None, device: str = "cpu") -> None:
        """device: "cpu" or "cuda"."""
        self.config, self.options, self.device = config, options or PlanOptions(), device
        self.dtype = config.dtype if self.options.dtype == "auto" else self.options.dtype
        self.item_size = ITEM_SIZE[self.dtype]  # bytes of a float
        self.weights = weight_bytes(config, self.item_size, self.options.vision, self.options.head)

    @property
    def images_at_once(self) -> int:
        """Images that the vision encoder computes in one pass."""
        return images_at_once(self.config.visual, self.item_size, self.device)

    @property
    def kv_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        import torch

        return bytes_per_token(self.config, getattr(torch, "int8" if self.options.kv == "int8" else self.dtype))

    @property
    def kv_per_image(self) -> int:
        """Bytes of KV cache of the tokens of an image in a prompt, start and end included."""
        return self.config.visual.span * self.kv_per_token

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of one image, cached so that it need not be encoded again."""
        return self.config.visual.n_queries * self.config.hidden_size * self.item_size

    def peak(self, workload: Workload, device: Device | None = None) -> Peak:
        """The highest memory use of a workload.

        On a CPU weights may be pages of a file, resident once they are read: little of the vision encoder without an
        image, and of the embedding the rows of the tokens, in the pieces that the system reads.
        """
        parts = dict(self.weights)
        if self.device == "cpu":
            parts["vision"] = self._vision_bytes(bool(workload.images))
            if "embedding" in self._mapped and parts["head"]:  # else they are tied, and the head reads it all
                parts["embedding"] = min(parts["embedding"], workload.prompt * READAHEAD)
        elif self.options.embedding_on_host:
            parts["embedding"] = 0
        return Peak(
            **parts,
            kv=self._kv_bytes(workload.tokens),
            features=workload.images * self.feature_bytes,
            workspace=self._workspace(workload),
            reserved=0 if device is None else device.reserved,
        )

    @property
    def _mapped(self) -> tuple[str, ...]:
        """Parts that are pages of a file: none where all floats are converted at load."""
        return self.options.mapped if self.dtype == self.config.dtype else ()

    def _vision_bytes(self, used: bool) -> int:
        """Bytes of the vision encoder that a CPU has in memory, `used` or not.

        The resampler's queries are projected at load, and their third of a matrix stays with the other two; the last
        matrix is published transposed, and transposed at load where it stays float. Positions are resized to the grid.
        """
        v = self.config.visual
        published, matrix = self.weights["vision"], v.output_dim**2 * self.item_size
        computed = matrix + v.num_patches * (v.width + v.output_dim) * self.item_size
        if "vision" not in self._mapped:
            return published + computed
        transposed = matrix if self.options.vision == "keep" else 0
        return (published if used else transposed) + transposed + computed

    def capacity(self, device: Device) -> Capacity:
        """How many tokens, or images with their tokens, fit next to the weights and a full step."""
        empty = self.peak(Workload(0, self.options.max_step_tokens, 1), device)
        if self.device == "cpu":
            empty = empty._replace(embedding=self.weights["embedding"])
        free = max(0, device.memory - empty.total)
        return Capacity(free // self.kv_per_token, free // (self.kv_per_image + self.feature_bytes))

    def bytes_read_per_token(self, context: int) -> int:
        """Bytes that generating one token reads: the decoder, the head, and the KV cache of its context."""
        return self.weights["language"] + self._head_read + context * self.kv_per_token

    @property
    def _head_read(self) -> int:
        return self.weights["head"] or self.weights["embedding"]  # tied: the table is the head

    def bound_tokens_per_s(self, device: Device, context: int) -> float | None:
        """The most tokens per second of one request, if reading memory took all the time: a bound, not a forecast."""
        return None if device.bandwidth is None else device.bandwidth / self.bytes_read_per_token(context)

    def compiled_bytes(self, workload: Workload) -> int:
        """Bytes of code that a CPU without our kernels compiles and keeps: oneDNN's products of 16-bit weights."""
        import torch

        from qvl_kernels import ops_for, reference

        if self.device != "cpu" or self.item_size == 4 or ops_for(torch.device("cpu")) is not reference:
            return 0
        c, v, step = self.config, self.config.visual, self.options.max_step_tokens
        sizes = 0
        if c.quantization is None:
            sizes += len({*decoder_linears(c).values()}) * _num_sizes(workload.prompt, step)
        if workload.images and self.options.vision == "keep":
            patches = workload.images * v.num_patches, self.images_at_once * v.num_patches
            queries = workload.images * v.n_queries, self.images_at_once * v.n_queries
            sizes += len(PATCH_LINEARS) * _num_sizes(*patches) + len(QUERY_LINEARS) * _num_sizes(*queries)
        return sizes * COMPILED

    def _kv_bytes(self, tokens: int) -> int:
        """Bytes of the blocks of `tokens` and of the null block; on a CPU in whole pages."""
        from qvl_kernels.memory import touched_bytes

        blocks, tensors = cdiv(tokens, BLOCK_SIZE), 2 * self.config.num_hidden_layers
        block = BLOCK_SIZE * self.kv_per_token // tensors
        resident = touched_bytes(blocks * block, block) if self.device == "cpu" else blocks * block
        return tensors * (resident + block)

    def _workspace(self, workload: Workload) -> int:
        """The most bytes that a step holds apart from weights and caches: in attention, an MLP, or the vision encoder.

        Counted per token are the tensors that are alive at the widest line of `Block` in `model/language.py`, and per
        patch those of `VisionBlock` in `model/vision.py`.
        """
        c, tokens = self.config, min(workload.prompt, self.options.max_step_tokens)
        hidden, ffn = c.hidden_size, c.ffn_width
        attention = 8 * hidden  # residual, normed; q | k | v, q rotated, context, projected
        mlp = 4 * hidden + 3 * ffn  # residual before and after, normed twice; up | gate, their product
        if self.device == "cpu":
            mlp += ffn if c.quantization is None else 0  # up and gate are two products, then concatenated
            mlp += max(hidden, ffn)  # a product's input in its kernel's layout, kept until the next
        tables = 4 * (2 * c.rotary_dim + c.rotary_dim // 2)  # cos, sin and frequencies, float32
        decoder = tokens * (self.item_size * max(attention, mlp) + tables)
        v, images = c.visual, min(workload.images, self.images_at_once)
        patch = 3 * v.width + 2 * v.mlp_width  # residual, what attention adds, their sum; before and after GELU
        resampled = v.width + 4 * v.output_dim  # patches, projected, keys with positions, keys, values
        pixels = 4 * 3 * v.image_size**2
        encoder = images * (v.num_patches * self.item_size * max(patch, resampled) + pixels)
        logits = c.vocab_size * (self.item_size + 4)  # of one token, and once more in float32
        return max(decoder, encoder) + logits + self.compiled_bytes(workload)


def _num_sizes(rows: int, at_once: int) -> int:
    """How many different numbers of rows are multiplied, where `rows` are computed `at_once` per pass."""
    return len({at_once if rows >= at_once else 0, rows % at_once} - {0})
