"""Muon for the matrices of blocks and resampler, AdamW for the rest, float32 masters under a bfloat16 model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig

from .team import Team

ADAM_ONLY = ("wte", "lm_head", "positional", "query", "probe", "conv1")
MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.98), 1e-8


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, batched, by a quintic Newton-Schulz iteration (Jordan et al. 2024, Muon)."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out


@dataclass(slots=True)
class Slot:
    """One parameter: the bfloat16 tensor, its float32 master, moments, and how Muon splits it into square matrices."""

    name: str
    param: nn.Parameter
    master: Tensor
    first: Tensor
    second: Tensor | None = None  # AdamW only
    split: Callable[[Tensor], Tensor] | None = None  # [out, in] -> [n, o, i]; Muon only
    join: Callable[[Tensor], Tensor] | None = None


class Optimizer:
    """Muon and AdamW over float32 masters, with gradient clipping at norm 1."""

    def __init__(
        self, model: nn.Module, probe: nn.Module, config: ModelConfig, rate: float, decay: float = 0.05
    ) -> None:
        self.rate, self.decay, self.steps = rate, decay, 0
        named = [*model.named_parameters(), *((f"probe.{n}", p) for n, p in probe.named_parameters())]
        self.slots = [_slot(n, p, config) for n, p in named if p.requires_grad]

    def step(self, scale: float, team: Team) -> float:
        """One update at `scale` times the rate; gradients must be equal in all processes. Returns the gradient norm."""
        self.steps += 1
        norm = float(torch.stack([_grad(s).norm() for s in self.slots]).norm())
        clip, rate = min(1.0, 1.0 / (norm + 1e-6)), self.rate * scale
        for s in (s for s in self.slots if s.split is None):
            self._adam(s, _grad(s) * clip, rate)
        self._muon([s for s in self.slots if s.split is not None], clip, rate, team)
        for s in self.slots:
            s.param.data.copy_(s.master)
            s.param.grad = None
        return norm

    def _adam(self, s: Slot, g: Tensor, rate: float) -> None:
        assert s.second is not None
        s.first.lerp_(g, 1 - BETAS[0])
        s.second.lerp_(g * g, 1 - BETAS[1])
        m, v = s.first / (1 - BETAS[0] ** self.steps), s.second / (1 - BETAS[1] ** self.steps)
        s.master.mul_(1 - rate * (self.decay if s.param.dim() >= 2 else 0.0)).addcdiv_(m, v.sqrt() + EPS, value=-rate)

    def _muon(self, slots: list[Slot], clip: float, rate: float, team: Team) -> None:
        """Matrices of one shape are orthogonalized together; every process takes its share of them."""
        shapes: dict[tuple[int, int], list[tuple[Slot, Tensor]]] = {}
        for s in slots:
            g = _grad(s) * clip
            s.first.mul_(MOMENTUM).add_(g)
            parts = s.split(g + MOMENTUM * s.first)  # type: ignore[misc]
            shapes.setdefault((parts.shape[1], parts.shape[2]), []).append((s, parts))
        done, used = [], 0
        for shape, group in shapes.items():
            stack = torch.cat([parts for _, parts in group])
            room = team.directions[used : used + stack.numel()].view_as(stack)
            used += stack.numel()
            if team.rank < len(stack):
                room[team.rank :: team.size] = orthogonal(stack[team.rank :: team.size]) * 0.2 * max(shape) ** 0.5
            done.append((group, room))
        team.wait()
        for group, room in done:
            for (s, _), direction in zip(group, room.split_with_sizes([len(parts) for _, parts in group]), strict=True):
                update = s.join(direction).view_as(s.master)  # type: ignore[misc]
                s.master.mul_(1 - rate * self.decay).add_(update, alpha=-rate)

    def state(self) -> dict[str, object]:
        """The step count, masters and moments by parameter name."""
        tensors = {s.name: {"master": s.master, "first": s.first, "second": s.second} for s in self.slots}
        return {"steps": self.steps, "tensors": tensors}

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        self.steps = state["steps"]  # type: ignore[assignment]
        for s in self.slots:
            saved = state["tensors"][s.name]  # type: ignore[index]
            s.master.copy_(saved["master"])
            s.first.copy_(saved["first"])
            if s.second is not None:
                s.second.copy_(saved["second"])
            s.param.data.copy_(s.master)


class Average:
    """Exponential moving average of the weights: what is scored and shipped."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.tensors = {n: p.detach().float().clone() for n, p in named}

    def update(self, masters: Iterable[Slot], step: int) -> None:
        """Move the average toward the masters; early steps weigh more."""
        keep = min(self.decay, 1 - 10 / (step + 10))
        for s in masters:
            if s.name in self.tensors:
                self.tensors[s.name].lerp_(s.master, 1 - keep)


def _grad(s: Slot) -> Tensor:
    return torch.zeros_like(s.master) if s.param.grad is None else s.param.grad.float()


def _slot(name: str, p: nn.Parameter, c: ModelConfig) -> Slot:
    slot = Slot(name, p, p.detach().float().clone(), torch.zeros_like(p, dtype=torch.float32))
    if p.dim() != 2 or any(k in name for k in ADAM_ONLY):
        slot.second = torch.zeros_like(slot.master)
    elif "resblocks" in name and "in_proj" in name:  # q, k, v of each head
        heads, width = c.visual.heads, c.visual.width
        slot.split = lambda t: t.view(heads, 3, -1, width).transpose(0, 1).reshape(3, width, width)
        slot.join = lambda t: t.view(3, heads, -1, width).transpose(0, 1).reshape(3 * width, width)
    elif "c_attn" in name or "in_proj" in name:  # q, k, v one after another
        slot.split, slot.join = lambda t: t.view(3, t.shape[1], t.shape[1]), lambda t: t.reshape(-1, t.shape[-1])
    else:
        slot.split, slot.join = lambda t: t[None], lambda t: t[0]
    return slot
