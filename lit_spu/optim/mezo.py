"""MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333): training with forward passes alone.

A step looks at the loss a little way along a random direction and against it (SPSA), and moves along the direction by
their difference. Nothing is kept but a number a direction: the direction itself is drawn again from its key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer

from lit_spu.optim.perturbation import Gaussian, LowRank, Noise, Perturbed, Rademacher, Table, key_of

NoiseName = Literal["gaussian", "rademacher", "table", "low_rank"]

NOISES: dict[str, type[Noise]] = {"gaussian": Gaussian, "rademacher": Rademacher, "table": Table, "low_rank": LowRank}


class MeZO(Optimizer):
    """SPSA with two evaluations a direction: g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, and θ ← (1 − lr·wd)θ − lr·mean of all g·z.

    Weights are bitwise what they were after an evaluation, whatever their precision; those in half precision keep what
    an update leaves over, so that small ones add up.

    Args:
        params: Weights, or named ones or groups of such, as any torch optimizer's. A weight's z depends on its name.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        epsilon: ε, how far the loss is looked at.
        noise: The distribution of z.
        directions: n, how many are averaged in a step (n-SPSA).
        seed: Of all directions; the same on all ranks.
        reduce: Gives the sums over all ranks of a tensor on each, where there are several.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        epsilon: float = 1e-3,
        noise: NoiseName = "gaussian",
        directions: int = 1,
        seed: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        if epsilon <= 0 or directions < 1:
            raise ValueError(f"epsilon={epsilon} must be above 0, and directions={directions} at least 1")
        self.epsilon, self.directions, self.seed, self.reduce = epsilon, directions, seed, reduce
        self.noise = NOISES[noise]()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], examples: int = 1) -> Tensor:  # type: ignore[override]
        """Evaluate the loss 2n times and move; gives the mean of the losses.

        Ranks exchange the sums of their examples' losses and how many these are, and nothing else: each then takes the
        same step.

        Args:
            closure: The mean loss of this step's batch, a scalar, at the weights as they are read.
            examples: How many it is the mean of.
        """
        losses = torch.stack([self._losses(j, closure) for j in range(self.directions)])
        sums = self.reduce(torch.cat([losses.flatten() * examples, losses.new_tensor([examples])]))
        losses = (sums[:-1] / sums[-1]).view_as(losses).cpu()
        self.apply(((losses[:, 0] - losses[:, 1]) / (2 * self.epsilon)).float())
        return losses.mean()

    @torch.no_grad()
    def apply(self, slopes: Tensor) -> None:
        """Take a step whose slopes g [n] along its directions are known; one that is not finite is left out."""
        along = [0.0] * len(slopes) if isinstance(slopes, FakeTensor) else slopes.tolist()
        for group, name, parameter in self._named():
            moves = [
                (self._key(j, name), -group["lr"] * g / len(along)) for j, g in enumerate(along) if math.isfinite(g)
            ]
            self.noise.move(parameter, moves, group["lr"] * group["weight_decay"], self._rest(parameter))
        for group in self.param_groups:
            group["step"] += 1

    def _losses(self, direction: int, closure: Callable[[], Tensor]) -> Tensor:
        """The loss a little way along a direction, and against it."""
        keys, found = [(parameter, self._key(direction, name)) for _, name, parameter in self._named()], []
        for sign in (1, -1):
            with Perturbed(keys, self.noise, sign * self.epsilon):
                found.append(closure().double())
        return torch.stack(found)

    def _key(self, direction: int, name: str) -> int:
        return key_of(self.seed, self.param_groups[0]["step"], direction, name)

    def _named(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Every weight with its group and its name, or its number where it has none."""
        numbers = map(str, count())
        for group in self.param_groups:
            for parameter, name in zip(group["params"], group.get("param_names", numbers), strict=False):
                yield group, name, parameter

    def _rest(self, parameter: Tensor) -> Tensor | None:
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            return None
        state = self.state[parameter]
        if not state:
            state["rest"] = torch.zeros_like(parameter)
        rest: Tensor = state["rest"]
        return rest
