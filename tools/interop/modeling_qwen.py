"""A tiny decoder with the published names, for quantizers that want a model of transformers.

Each checkpoint of `make interop` has a copy of this file, as published checkpoints have the original's code. Quantizers
and this project are compared linear by linear, so the forward pass has the original's shape and not its details: no
rotary embedding, and the vision encoder is there only as weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class QWenConfig(PretrainedConfig):
    """The keys of config.json that the decoder needs; the others are kept."""

    model_type = "qwen"

    def __init__(self, hidden_size: int = 128, intermediate_size: int = 512, **others: Any) -> None:
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = others.pop("num_hidden_layers", 2)
        self.num_attention_heads = others.pop("num_attention_heads", 2)
        self.vocab_size = others.pop("vocab_size", 480)
        self.visual = others.pop("visual", {})
        self.use_cache = others.pop("use_cache", True)  # quantizers switch it off
        super().__init__(tie_word_embeddings=others.pop("tie_word_embeddings", False), **others)


class RMSNorm(nn.Module):
    """Normalize by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [.., width] to the same shape."""
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * self.weight


class QWenAttention(nn.Module):
    """Causal attention of all heads."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [batch, n, width] to the same shape."""
        batch, n, width = x.shape
        q, k, v = (t.view(batch, n, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).split(width, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, n, width))  # type: ignore[no-any-return]


class QWenMLP(nn.Module):
    """w1(x) times silu of w2(x)."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.w1, self.w2 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [batch, n, width] to the same shape."""
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))  # type: ignore[no-any-return]


class QWenBlock(nn.Module):
    """One block of the decoder; returns a tuple, as the original does."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = RMSNorm(config.hidden_size), QWenAttention(config)
        self.ln_2, self.mlp = RMSNorm(config.hidden_size), QWenMLP(config)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        """Map hidden states [batch, n, width] to the same shape."""
        x = hidden_states + self.attn(self.ln_1(hidden_states))
        return (x + self.mlp(self.ln_2(x)),)


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both classes."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    _no_split_modules = ("QWenBlock",)

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight is in the checkpoint."""


class QWenModel(QWenPreTrainedModel):
    """Embedding, blocks, last norm, and the weights of the vision encoder."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size)
        self.visual = nn.Module()
        for name, shape in config.visual.get("stored_shapes", {}).items():
            _add(self.visual, name, shape)
        self.post_init()


class QWenLMHeadModel(QWenPreTrainedModel):
    """The model under its published class name."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        """Map ids [batch, n] to logits [batch, n, vocabulary]."""
        x = self.transformer.wte(input_ids)
        for block in self.transformer.h:
            (x,) = block(x, attention_mask=attention_mask)  # AutoGPTQ reads it
        return CausalLMOutputWithPast(logits=self.lm_head(self.transformer.ln_f(x)))


def _add(module: nn.Module, name: str, shape: list[int]) -> None:
    """A parameter of that name, in modules without a forward pass."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, nn.Parameter(torch.zeros(shape)))
