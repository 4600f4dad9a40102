"""AdamW over float32 masters (torch's own), or over bfloat16 weights that are rounded at random, and the schedule.

A bfloat16 weight has 8 bits: an update below 1/256 of it would be lost by rounding to nearest. Without masters it is
rounded up or down at random, with the probability that keeps its expectation, so that small updates count on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.sharded import is_sharded, put, whole

EPS, BETA1 = 1e-8, 0.9


def rate_at(step: int, steps: int, options: FinetuneOptions) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear warm-up, then a cosine to zero or a constant."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return options.rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.rate
    return options.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Optimizer:
    """Updates trained parameters; gradients of a step add up in float32 where there are masters.

    A 16-bit parameter with a master hands its gradient over as soon as autograd has made it, so that no more than one
    of those is in memory.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], options: FinetuneOptions) -> None:
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        lean = options.masters == "bfloat16"
        self.lean = {name: p for name, p in self.parameters.items() if lean and p.dtype == torch.bfloat16}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name in self.lean:
                continue
            self.masters[name] = parameter if parameter.dtype.itemsize > 2 else _master(parameter)
        kinds: dict[tuple[bool, bool], list[Tensor]] = {}
        for master in self.masters.values():  # sharded and whole tensors do not mix in a group
            kinds.setdefault((master.dim() < 2, is_sharded(master)), []).append(master)
        groups = [
            {"params": own, "weight_decay": 0.0 if plain else options.weight_decay} for (plain, _), own in kinds.items()
        ]
        self._adam = (
            torch.optim.AdamW(groups, lr=options.rate, betas=(BETA1, options.beta2), eps=EPS) if groups else None
        )
        self._random = (
            RandomlyRoundedAdamW(self.lean, options.beta2, options.weight_decay, options.seed) if self.lean else None
        )

    def gradients(self) -> list[Tensor]:
        """The gradients of a step so far, by parameter; those that no sample touched are zeros."""
        found = []
        for holder in (*self.masters.values(), *self.lean.values()):
            if holder.grad is None:
                holder.grad = torch.zeros_like(holder)
            found.append(holder.grad)
        return found

    def norm(self) -> float:
        """The norm of the whole gradient."""
        return float(torch.stack([whole(g.float().norm()) for g in self.gradients()]).norm())

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    def step(self, rate: float) -> None:
        """Update the parameters, and drop the gradients."""
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        if self._random is not None:
            self._random.step(rate)
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        for holder in (*self.masters.values(), *self.lean.values(), *self.parameters.values()):
            holder.grad = None

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, whole; every process must call it."""
        adam: dict[str, dict[str, Tensor]] = {}
        for name, master in self.masters.items():
            own = {} if self._adam is None else self._adam.state.get(master, {})
            adam[name] = {key: whole(value) for key, value in own.items()}
        return {
            "adam": adam,
            "random": None if self._random is None else self._random.state(),
            "masters": {name: whole(master.detach()) for name, master in self.masters.items()},
            "lean": {name: parameter.detach() for name, parameter in self.lean.items()},
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; every process must call it."""
        for name, moments in state["adam"].items():
            if self._adam is None or not moments:
                continue
            master = self.masters[name]
            own = self._adam.state[master]
            for key, stored in moments.items():
                own[key] = stored.clone() if key == "step" else torch.zeros_like(master)
                if key != "step":
                    put(own[key], stored)
        if self._random is not None:
            self._random.load(state["random"])
        for name, stored in {**state["masters"], **state["lean"]}.items():
            holder = self.masters.get(name, self.parameters[name])
            put(holder, stored)
            if holder is not self.parameters[name]:
                self.parameters[name].copy_(stored)


class RandomlyRoundedAdamW:
    """AdamW (Loshchilov and Hutter 2019) with 16-bit weights and moments: 8 bytes a parameter, gradient included."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], beta2: float, decay: float, seed: int) -> None:
        self.parameters, self.beta2, self.decay, self.seed, self.steps = dict(parameters), beta2, decay, seed, 0
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update each parameter that has a gradient, a slice of rows at a time."""
        self.steps += 1
        bias1, bias2 = 1 - BETA1**self.steps, 1 - self.beta2**self.steps
        for number, (name, parameter) in enumerate(self.parameters.items()):
            if parameter.grad is None:
                continue
            generator = torch.Generator(parameter.device).manual_seed(hash((self.seed, self.steps, number)) % 2**62)
            decay = self.decay if parameter.dim() >= 2 else 0.0
            tensors = (parameter, parameter.grad, self.first[name], self.second[name])
            rows = max(1, (1 << 24) // max(1, parameter[0].numel()))
            for p, g, m, v in zip(*(torch.split(t, rows) for t in tensors), strict=True):
                grad = g.float()
                first = m.float().lerp_(grad, 1 - BETA1)
                second = v.float().lerp_(grad.square(), 1 - self.beta2)
                wide = p.float() * (1 - rate * decay)
                wide.addcdiv_(first / bias1, (second / bias2).sqrt_() + EPS, value=-rate)
                for target, value in ((p, wide), (m, first), (v, second)):
                    target.copy_(randomly_rounded(value, generator))

    def state(self) -> dict[str, Any]:
        """The step count and the moments."""
        return {"steps": self.steps, "first": self.first, "second": self.second}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.steps = state["steps"]
        for mine, stored in ((self.first, state["first"]), (self.second, state["second"])):
            for name, tensor in mine.items():
                tensor.copy_(stored[name])


def randomly_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down, with the value as expectation: noise below the last bit, then a cut."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    cut = torch.where(values.isfinite(), (bits + noise) & ~0xFFFF, bits)
    return cut.view(torch.float32).to(torch.bfloat16)


def _master(parameter: nn.Parameter) -> Tensor:
    master = parameter.detach().float().clone()

    def hand_over(p: Tensor) -> None:
        if p.grad is not None:
            grad = p.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            p.grad = None

    parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
    return master
