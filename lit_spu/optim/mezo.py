"""MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333): training with forward passes alone.

A step looks at the loss a little way along a random direction and against it (SPSA), and moves along the direction by
their difference. Nothing is kept but a number a direction: the direction itself is drawn again from its key.
"""

from __future__ import annotations

import math
import signal
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer

from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.optim.perturbation import Gaussian, LowRank, Noise, Perturbed, Rademacher, Table, key_of

NoiseName = Literal["gaussian", "rademacher", "table", "low_rank"]

Rows = Literal["all", "seen"]

NOISES: dict[str, type[Noise]] = {"gaussian": Gaussian, "rademacher": Rademacher, "table": Table, "low_rank": LowRank}


class MeZO(Optimizer):
    """SPSA with two evaluations a direction: g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, and θ ← (1 − lr·wd)θ − lr·mean of all g·z.

    Weights are bitwise what they were after an evaluation, whatever their precision; those in half precision keep what
    an update leaves over, so that small ones add up. `history` has what every step did, in fp32: the learning rate of
    every group, as the step took it, and the slope along every direction; `left_out` counts those not finite.

    Args:
        params: Weights, or named ones or groups of such, as any torch optimizer's. A weight's z depends on its name.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        epsilon: ε, how far the loss is looked at.
        noise: The distribution of z.
        directions: n, how many are averaged in a step (n-SPSA).
        share: Of the weights, how many take part in a step, drawn anew for each; the others are neither perturbed nor
            moved (LeZO, https://arxiv.org/abs/2410.09823, which draws whole layers).
        rows: Move all of an embedding, or only the rows that the step's batch has read: the others have no gradient,
            and would walk at random.
        normalize: Divide the slopes by the standard deviation of the step's losses, so that steps are of like length
            (FZOO, https://arxiv.org/abs/2506.09034).
        seed: Of all directions; the same on all ranks.
        reduce: Gives the sums over all ranks of a tensor on each, where there are several.
        shard: This rank and how many there are, to let each look along n directions of its own.

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
        share: float = 1.0,
        rows: Rows = "all",
        normalize: bool = False,
        seed: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if epsilon <= 0 or directions < 1 or not 0 < share <= 1:
            raise ValueError(
                f"epsilon={epsilon} must be above 0, directions={directions} at least 1, and share={share} above 0 and"
                " at most 1"
            )
        self.epsilon, self.share, self.rows, self.normalize = epsilon, share, rows, normalize
        self.seed, self.reduce = seed, reduce
        self.noise = NOISES[noise]()
        rank, ranks = shard
        self.directions = directions * ranks
        self.own = range(rank * directions, (rank + 1) * directions)
        self.history = array("f")
        self.left_out = 0
        self.recorded: Sequence[Sequence[float]] = ()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.start = fingerprint((name, parameter) for _, name, parameter in self._all())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], examples: int = 1) -> Tensor | None:  # type: ignore[override]
        """Evaluate the loss 2n times and move; gives the mean of the losses.

        Ranks exchange the sums of their examples' losses and how many these are, and nothing else (with `rows` seen,
        also which): each then takes the same step. Steps in `recorded`, rows of a history, are taken as they were,
        without a look at the loss: they give nothing.

        Args:
            closure: The mean loss of this step's batch, a scalar, at the weights as they are read.
            examples: How many it is the mean of.
        """
        if (done := self.param_groups[0]["step"]) < len(self.recorded):
            self.repeat(self.recorded[done])
            return None
        seen: dict[int, Tensor] = {}
        found = {j: self._losses(j, closure, seen) for j in self.own}
        nothing = torch.zeros_like(found[self.own[0]])
        losses = torch.stack([found.get(j, nothing) for j in range(self.directions)])
        counts = losses.new_tensor([examples * (j in found) for j in range(self.directions)])
        sums = self.reduce(torch.cat([losses * examples, counts[:, None]], dim=1))
        losses = (sums[:, :2] / sums[:, 2:]).cpu()
        slopes = (losses[:, 0] - losses[:, 1]) / (2 * self.epsilon)
        if self.normalize:
            slopes /= losses.std()
        if isinstance(slopes, FakeTensor):  # has no values
            self.apply([0.0] * self.directions)
        else:
            read = {key: self.reduce(rows).nonzero().flatten() for key, rows in seen.items()}
            self.apply(slopes.tolist(), rows=read)
        return losses.mean()

    @torch.no_grad()
    def apply(
        self, slopes: Sequence[float], rates: Sequence[float] | None = None, rows: Mapping[int, Tensor] | None = None
    ) -> None:
        """Take a step whose slopes g along its directions are known; one that is not finite is left out.

        Args:
            slopes: One a direction.
            rates: The learning rate of every group, if it is not what the groups say now.
            rows: By a weight's id, its only rows that move.
        """
        done = array("f", [*(rates or [group["lr"] for group in self.param_groups]), *slopes])
        self.history.extend(done)
        along = done[len(self.param_groups) :]
        self.left_out += sum(not math.isfinite(g) for g in along)
        for number, name, parameter in self._taking_part():
            group, rate = self.param_groups[number], done[number]
            moves = [(self._key(j, name), -rate * g / len(along)) for j, g in enumerate(along) if math.isfinite(g)]
            decay, rest = rate * group["weight_decay"], self._rest(parameter)
            if rows and id(parameter) in rows:
                self.noise.move_rows(parameter, rows[id(parameter)], moves, decay, rest)
            else:
                self.noise.move(parameter, moves, decay, rest)
        for group in self.param_groups:
            group["step"] += 1

    def repeat(self, row: Sequence[float]) -> None:
        """Take a step again, of which a history has this row."""
        groups = len(self.param_groups)
        self.apply(row[groups:], row[:groups])

    def state_dict(self) -> dict[str, Any]:
        own = {"seed": self.seed, "start": self.start, "history": torch.tensor(self.history)}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed, self.start = state_dict["seed"], state_dict["start"]
        self.history = array("f", state_dict["history"].tolist())

    def _losses(self, direction: int, closure: Callable[[], Tensor], seen: dict[int, Tensor]) -> Tensor:
        """The loss a little way along a direction, and against it; marks in `seen` which rows of a weight it reads."""
        keys, found = [(parameter, self._key(direction, name)) for _, name, parameter in self._taking_part()], []
        for sign in (1, -1):
            with _held_back(), Perturbed(keys, self.noise, sign * self.epsilon) as perturbed:
                found.append(closure().double())
        if self.rows == "seen" and not seen:
            for parameter, _ in keys:
                if rows := perturbed.read.get(id(parameter), ()):
                    seen[id(parameter)] = torch.zeros(len(parameter), device=parameter.device)
                    seen[id(parameter)][torch.cat(rows)] = 1
        return torch.stack(found)

    def _taking_part(self) -> Iterator[tuple[int, str, Tensor]]:
        """The weights that are perturbed and moved in this step."""
        for number, name, parameter in self._all():
            if self.share == 1 or self._key(-1, name) < self.share * 2**63:
                yield number, name, parameter

    def _all(self) -> Iterator[tuple[int, str, Tensor]]:
        """Every weight with the number of its group and its name, or its own number where it has none."""
        numbers = map(str, count())
        for number, group in enumerate(self.param_groups):
            for parameter, name in zip(group["params"], group.get("param_names", numbers), strict=False):
                yield number, name, parameter

    def _key(self, direction: int, name: str) -> int:
        return key_of(self.seed, self.param_groups[0]["step"], direction, name)

    def _rest(self, parameter: Tensor) -> Tensor | None:
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            return None
        state = self.state[parameter]
        if not state:
            state["rest"] = torch.zeros_like(parameter)
        rest: Tensor = state["rest"]
        return rest


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold Ctrl-C back to the end: torch's stack of modes does not bear an error just anywhere. A second one is not."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, handler)
        came.append((number, frame))

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for number, frame in came:
        handler(number, frame)
