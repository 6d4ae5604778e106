"""MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333): training with forward passes alone.

A step evaluates the loss at θ + εz and at θ − εz for a random direction z (SPSA). The difference, over 2ε, is the slope
along z, and the step moves the weights against it. Only one number per direction is stored: z is drawn again from its
key.
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
from torch.optim import Optimizer

from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.noise import GaussianNoise, LowRankNoise, Noise, RademacherNoise, TableNoise
from lit_spu.optim.perturbed import Perturbed

NoiseName = Literal["gaussian", "rademacher", "table", "low_rank"]

Rows = Literal["all", "seen"]

NOISES: dict[str, type[Noise]] = {
    "gaussian": GaussianNoise,
    "rademacher": RademacherNoise,
    "table": TableNoise,
    "low_rank": LowRankNoise,
}


class MeZOOptimizer(Optimizer):
    """SPSA with two evaluations per direction.

    A slope is g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, and the update is θ ← (1 − lr·wd)θ − lr·mean(g·z).

    An evaluation does not write the weights, in any precision. For weights in half precision, the optimizer's state
    holds the rounding error of all updates so far (`rounding_residual`), so that small updates add up.

    Args:
        params: Weights, named weights, or groups of either, as for any torch optimizer. A weight's z depends on its
            name.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        epsilon: Perturbation scale ε.
        noise: Distribution of z.
        directions: Number n of directions per step. Their updates are averaged (n-SPSA).
        share: Share of the weights that take part in a step, drawn again for every step. The other weights are neither
            perturbed nor updated (LeZO, https://arxiv.org/abs/2410.09823, which draws whole layers).
        rows: Update all rows of an embedding, or only those that the step's batch has read. The updates of the other
            rows would be a random walk, because their gradient is zero.
        normalize: Divide the slopes by the standard deviation of the step's losses, so that all steps have a similar
            length (FZOO, https://arxiv.org/abs/2506.09034).
        seed: Random seed of all directions, the same on all ranks.
        reduce: Function that returns the sum of a tensor over all ranks.
        shard: This rank and the number of ranks, if every rank evaluates n directions of its own.

    Attributes:
        history: One row per step, in fp32: the learning rate of every group and the slope along every direction.
        replay_rows: Rows of a history. The first steps are taken from them, without an evaluation.
        num_skipped_directions: Number of directions skipped so far because their slope was not finite.
        initial_fingerprint: Fingerprint of the initial weights.

    Raises:
        ValueError: If a number is out of range.
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
        rank, num_ranks = shard
        self.directions = directions * num_ranks
        self.rank_directions = range(rank * directions, (rank + 1) * directions)
        self.history = array("f")
        self.num_skipped_directions = 0
        self.replay_rows: Sequence[Sequence[float]] = ()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.initial_fingerprint = fingerprint((name, parameter) for _, name, parameter in self._all_weights())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], num_examples: int = 1) -> Tensor | None:  # type: ignore[override]
        """Evaluate the loss twice per direction, and update the weights.

        Ranks exchange only the sums of their examples' losses and the numbers of examples (with rows="seen", the rows
        that were read as well). All ranks then make the same update.

        Args:
            closure: Function that returns the mean loss of the step's batch, a scalar, at the weights that it reads.
            num_examples: Number of examples in the batch.

        Returns:
            The mean of all losses, or None for a step taken from `replay_rows`.
        """
        if (step := self.param_groups[0]["step"]) < len(self.replay_rows):
            self.replay_step(self.replay_rows[step])
            return None
        row_marks: dict[int, Tensor] = {}
        rank_losses = {j: self._evaluate(j, closure, row_marks) for j in self.rank_directions}
        zeros = torch.zeros_like(rank_losses[self.rank_directions[0]])
        losses = torch.stack([rank_losses.get(j, zeros) for j in range(self.directions)])
        counts = losses.new_tensor([num_examples * (j in rank_losses) for j in range(self.directions)])
        sums = self.reduce(torch.cat([losses * num_examples, counts[:, None]], dim=1))
        losses = (sums[:, :2] / sums[:, 2:]).cpu()
        slopes = (losses[:, 0] - losses[:, 1]) / (2 * self.epsilon)
        if self.normalize:
            slopes /= losses.std()
        rows_read = {key: self.reduce(marks).nonzero().flatten() for key, marks in row_marks.items()}
        self.apply_slopes(slopes.tolist(), rows=rows_read)
        return losses.mean()

    @torch.no_grad()
    def apply_slopes(
        self,
        slopes: Sequence[float],
        learning_rates: Sequence[float] | None = None,
        rows: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Update the weights by known slopes. Directions with a slope that is not finite are skipped.

        Args:
            slopes: The slope along every direction.
            learning_rates: The learning rate of every group; None uses the groups' present ones.
            rows: By the id of a weight, the indices of its rows to update. All rows of the other weights are updated.
        """
        row = array("f", [*(learning_rates or [group["lr"] for group in self.param_groups]), *slopes])
        self.history.extend(row)
        slopes_fp32 = row[len(self.param_groups) :]
        self.num_skipped_directions += sum(not math.isfinite(g) for g in slopes_fp32)
        for number, name, weight in self._active_weights():
            group, lr = self.param_groups[number], row[number]
            steps = [
                (self._key(j, name), -lr * g / len(slopes_fp32)) for j, g in enumerate(slopes_fp32) if math.isfinite(g)
            ]
            decay, residual = lr * group["weight_decay"], self._rounding_residual(weight)
            if rows and id(weight) in rows:
                self.noise.update_rows(weight, rows[id(weight)], steps, decay, residual)
            else:
                self.noise.update(weight, steps, decay, residual)
        for group in self.param_groups:
            group["step"] += 1

    def replay_step(self, row: Sequence[float]) -> None:
        """Take a recorded step again, from its row of a history."""
        num_groups = len(self.param_groups)
        self.apply_slopes(row[num_groups:], row[:num_groups])

    def state_dict(self) -> dict[str, Any]:
        extra = {
            "seed": self.seed,
            "initial_fingerprint": self.initial_fingerprint,
            "history": torch.tensor(self.history),
        }
        return super().state_dict() | extra

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed, self.initial_fingerprint = state_dict["seed"], state_dict["initial_fingerprint"]
        self.history = array("f", state_dict["history"].tolist())

    def _evaluate(self, direction: int, closure: Callable[[], Tensor], row_marks: dict[int, Tensor]) -> Tensor:
        """Return the losses at θ + εz and at θ − εz, [2], in fp64.

        With rows="seen", the first call of a step fills `row_marks`: by the id of a weight, 1 for each row that was
        read, else 0.
        """
        keys = [(weight, self._key(direction, name)) for _, name, weight in self._active_weights()]
        losses = []
        for sign in (1, -1):
            with delay_sigint(), Perturbed(keys, self.noise, sign * self.epsilon) as perturbed:
                losses.append(closure().double())
        if self.rows == "seen" and not row_marks:
            for weight, _ in keys:
                if rows := perturbed.rows_read.get(id(weight), ()):
                    row_marks[id(weight)] = torch.zeros(len(weight), device=weight.device)
                    row_marks[id(weight)][torch.cat(rows)] = 1
        return torch.stack(losses)

    def _active_weights(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield those of `_all_weights` that take part in this step."""
        for number, name, weight in self._all_weights():
            if self.share == 1 or self._key(-1, name) < self.share * 2**63:
                yield number, name, weight

    def _all_weights(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield every weight with its group's number and its name. An unnamed weight is named by its number."""
        numbers = map(str, count())
        for number, group in enumerate(self.param_groups):
            for weight, name in zip(group["params"], group.get("param_names", numbers), strict=False):
                yield number, name, weight

    def _key(self, direction: int, name: str) -> int:
        return key_of(self.seed, self.param_groups[0]["step"], direction, name)

    def _rounding_residual(self, weight: Tensor) -> Tensor | None:
        """Return the rounding residual of a weight in half precision, initially zeros, or None for other weights."""
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return None
        state = self.state[weight]
        if not state:
            state["rounding_residual"] = torch.zeros_like(weight)
        residual: Tensor = state["rounding_residual"]
        return residual


@contextmanager
def delay_sigint() -> Iterator[None]:
    """Delay SIGINT: an exception inside a TorchFunctionMode can corrupt its stack.

    A second SIGINT is not delayed. Outside the main thread, where Python handles no signals, this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    delayed: list[tuple[int, FrameType | None]] = []

    def delay(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, handler)
        delayed.append((number, frame))

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for number, frame in delayed:
        handler(number, frame)
