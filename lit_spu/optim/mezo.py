"""MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333): training with forward passes alone.

A step evaluates the loss at θ + εz and at θ − εz for a random direction z (SPSA). The difference, over 2ε, is the slope
along z, and the step moves the weights against it. Only one number per direction is stored: z is drawn again from its
key.
"""

from __future__ import annotations

import signal
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.errors import UserError
from lit_spu.optim.keyed_random import KeyedGenerators, key_of
from lit_spu.optim.noise import VERSION, GaussianNoise, LowRankNoise, Noise, RademacherNoise
from lit_spu.optim.perturbed import Perturbed
from lit_spu.optim.rounding import Rounding, is_half, round_stochastically
from lit_spu.optim.units import Unit, is_same_memory, make_layout

NoiseName = Literal["gaussian", "rademacher", "low_rank"]

Rows = Literal["all", "seen"]

Run = Callable[[str, Callable[[], Any], Iterable[torch.Generator]], Any]
"""Runs a function by its name, eagerly or as a graph that draws from these generators, and returns its output."""


def run_eagerly(name: str, function: Callable[[], Any], generators: Iterable[torch.Generator]) -> Any:
    """Run a function at once."""
    return function()


NOISES: dict[str, type[Noise]] = {"gaussian": GaussianNoise, "rademacher": RademacherNoise, "low_rank": LowRankNoise}


class MeZOOptimizer(Optimizer):
    """SPSA with two evaluations per direction.

    A slope is g = (ℓ(θ+εz) − ℓ(θ−εz)) / 2ε, and the update is θ ← (1 − lr·wd)θ − lr·mean(g·z).

    The weights are divided into units (see `units`): those inside each block, each table, and all others. Their data
    become views of the units' buffers. An evaluation does not write the weights, in any precision. A step does not wait
    for the device, unless the loss does.

    Args:
        params: Weights, named weights, or groups of either, as for any torch optimizer.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        epsilon: Perturbation scale ε.
        noise: Distribution of z.
        directions: Number n of directions per step. Their updates are averaged (n-SPSA).
        share: Share of the weights that take part in a step, drawn again for every step. The other weights are neither
            perturbed nor updated. Blocks and tables are drawn as a whole, as in LeZO
            (https://arxiv.org/abs/2410.09823), and other weights one by one.
        rows: Update all rows of a table, or only those that the step's batch has read. The updates of the other rows
            would be a random walk, because their gradient is zero.
        normalize: Divide the slopes by the standard deviation of the step's losses, so that all steps have a similar
            length (FZOO, https://arxiv.org/abs/2506.09034).
        rounding: Rounding of updated weights in half precision: `residual` stores the rounding error of all updates so
            far, which takes as much memory as the weights, so that small updates add up. `stochastic` rounds up or down
            at random, so that they add up in the mean. `nearest` loses updates below half the distance of two numbers.
        seed: Random seed of all directions, the same on all ranks.
        reduce: Function that returns the sum of a tensor over all ranks; None for one rank.
        shard: This rank and the number of ranks, if every rank evaluates n directions of its own.
        blocks: Modules that run one after the other, in every forward pass or not at all. Only the block itself reads
            the weights inside it.
        table_readers: Modules that read rows of a matrix, called with the row indices first, and the matrices. Nothing
            else reads these matrices.

    Attributes:
        replay_rows: Rows of a history. The first steps are taken from them, without an evaluation.
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
        rounding: Rounding = "residual",
        seed: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        shard: tuple[int, int] = (0, 1),
        blocks: Sequence[nn.Module] = (),
        table_readers: Sequence[tuple[nn.Module, nn.Parameter]] = (),
    ) -> None:
        if epsilon <= 0 or directions < 1 or not 0 < share <= 1:
            raise ValueError(
                f"epsilon={epsilon} must be above 0, directions={directions} at least 1, and share={share} above 0 and"
                " at most 1"
            )
        self.epsilon, self.share, self.rows, self.normalize, self.rounding = epsilon, share, rows, normalize, rounding
        self.seed, self.reduce = seed, reduce
        rank, num_ranks = shard
        self.directions = directions * num_ranks
        self.rank_directions = range(rank * directions, (rank + 1) * directions)
        self.replay_rows: Sequence[Sequence[float]] = ()
        self._history = array("f")
        self._new_rows: list[Tensor] = []
        self._constants: dict[str, tuple[Sequence[float], Tensor]] = {}
        self._memory: dict[str, Tensor] = {}  # what evaluations and updates read, at fixed addresses
        self._residuals: dict[Unit, Tensor] = {}
        self._generators = KeyedGenerators()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.initial_fingerprint = fingerprint((name, weight) for _, name, weight in self._all_weights())
        layout = make_layout(self._all_weights(), blocks, [weight for _, weight in table_readers], one_by_one=share < 1)
        self.layout, self.noise = layout, NOISES[noise](layout.units)
        self.perturbed = Perturbed(layout, self.noise, table_readers)
        self.perturbed.flatten()

    @property
    def history(self) -> array[float]:
        """One row per step, in fp32: the learning rate of every group and the slope along every direction.

        Reading it waits for the device, and returns a copy.
        """
        self._read_new_rows()
        return self._history[:]

    def _read_new_rows(self) -> None:
        if self._new_rows:
            self._history.extend(torch.stack(self._new_rows).flatten().tolist())
            self._new_rows.clear()

    @property
    def num_skipped_directions(self) -> int:
        """Number of directions skipped so far because their slope was not finite. Reading it waits for the device."""
        return int((~np.isfinite(np.asarray(self.history))).sum())

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor],
        num_examples: int = 1,
        run: Run = run_eagerly,
    ) -> Tensor | None:
        """Evaluate the loss twice per direction, and update the weights.

        Ranks exchange only the sums of their examples' losses and the numbers of examples (with rows="seen", the rows
        that were read as well). All ranks then make the same update.

        Args:
            closure: Function that returns the mean loss of the step's batch, a scalar, at the weights that it reads.
            num_examples: Number of examples in the batch.
            run: Function that runs each evaluation and the update. By default they run eagerly. Between two steps of
                equal batches, they differ by the values of tensors and the seeds of generators alone, unless `share` is
                below 1, `rows` is "seen", or rounding is stochastic.

        Returns:
            The mean of all losses, or None for a step taken from `replay_rows`.
        """
        if (step := self.param_groups[0]["step"]) < len(self.replay_rows):
            self.replay_step(self.replay_rows[step])
            return None
        self.perturbed.flatten()
        try:
            losses = self._evaluate(closure, num_examples, run)
            slopes = (losses[:, 0] - losses[:, 1]) / (2 * self.epsilon)
            if self.normalize:
                slopes /= losses.std()
            learning_rates = self._constant("lr", [group["lr"] for group in self.param_groups])
            self._apply_row(torch.cat([learning_rates, slopes.float()]), run)
        finally:
            for table in self.layout.tables:
                table.marks = None
            torch.clear_autocast_cache()  # it knows a weight by its identity
        return losses.mean()

    @torch.no_grad()
    def replay_step(self, row: Sequence[float]) -> None:
        """Take a recorded step again, from its row of a history."""
        self.perturbed.flatten()
        self._apply_row(torch.tensor(row, dtype=torch.float32, device=self.layout.units[0].device))

    def apply_slopes(self, slopes: Sequence[float]) -> None:
        """Update the weights by known slopes. Directions with a slope that is not finite are skipped."""
        self.replay_step([*(group["lr"] for group in self.param_groups), *slopes])

    @torch.no_grad()
    def sample(self, direction: int = 0) -> dict[Tensor, Tensor]:
        """Return z of each weight along a direction of the present step, in fp32."""
        key = self._key(direction)
        return {
            weight: z
            for unit in self.layout.units
            for weight, z in zip(unit.weights, self.noise.sample(unit, key), strict=True)
        }

    def release(self) -> None:
        """Give each weight memory of its own, and drop all buffers. The next step makes new ones.

        While the weights are views of a unit's buffer, one of them alone is saved with the whole buffer.
        """
        for unit in self.layout.units:
            unit.release()
        self.noise.release()
        self._residuals.clear()  # the state has them

    def state_dict(self) -> dict[str, Any]:
        extra = {
            "noise_version": VERSION,
            "seed": self.seed,
            "initial_fingerprint": self.initial_fingerprint,
            "history": torch.tensor(self.history, dtype=torch.float32),
        }
        return super().state_dict() | extra

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (version := state_dict.get("noise_version", "1 or 2")) != VERSION:
            raise UserError(
                f"The checkpoint's run by MeZO has noise of version {version}, and this lit_spu draws version {VERSION}"
                " alone. Resume the run with the lit_spu that wrote it, or start a new run from its weights:"
                " --model.weights instead of --ckpt_path."
            )
        super().load_state_dict(state_dict)
        self.seed, self.initial_fingerprint = state_dict["seed"], state_dict["initial_fingerprint"]
        self._history[:] = array("f", state_dict["history"].tolist())
        self._new_rows.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "layout"):
            raise UserError("add_param_group: MeZO divides its weights into units. Give all groups to its constructor.")
        super().add_param_group(param_group)

    def _evaluate(self, closure: Callable[[], Tensor], num_examples: int, run: Run) -> Tensor:
        """Return the losses at θ + εz and at θ − εz for all directions of all ranks, [directions, 2], in fp64."""
        active = set(self._active_units())
        if self.rows == "seen":
            for table in self.layout.tables:
                table.marks = torch.zeros(len(table.weights[0]), dtype=torch.float32, device=table.device)

        def evaluate() -> Tensor:
            with self.perturbed.apply(active):
                return closure()

        found = []
        for direction in self.rank_directions:
            for sign in (1, -1):
                self.noise.begin([self._key(direction)], self._fixed("scale", 1, 1).fill_(sign * self.epsilon))
                with delay_sigint():
                    loss = run("evaluation", evaluate, self.noise.generators)
                # a copy, because the next replay of a graph overwrites its output
                found.append(loss.to(torch.float64, copy=True))
        losses = torch.stack(found).view(-1, 2)
        if self.reduce is None:
            return losses
        sums = losses.new_zeros(self.directions, 3)
        rank = slice(self.rank_directions.start, self.rank_directions.stop)
        sums[rank, :2] = losses * num_examples
        sums[rank, 2] = num_examples
        sums = self.reduce(sums)
        for table in self.layout.tables:
            if table.marks is not None:
                table.marks = self.reduce(table.marks).clamp_(max=1)
        return sums[:, :2] / sums[:, 2:]

    def _apply_row(self, row: Tensor, run: Run = run_eagerly) -> None:
        """Update the weights by a row of a history, and append it."""
        if len(self._new_rows) == 256:  # bounds the memory of what has not been read
            self._read_new_rows()
        learning_rates, slopes = row[: len(self.param_groups)], row[len(self.param_groups) :]
        steps = self._fixed("steps", len(learning_rates), len(slopes))
        torch.mul(learning_rates[:, None], slopes.nan_to_num(0.0, 0.0, 0.0) / -len(slopes), out=steps)
        weight_decays = [group["weight_decay"] for group in self.param_groups]
        decays = self._fixed("decays", len(weight_decays))
        if any(weight_decays):
            torch.mul(learning_rates, self._constant("weight_decay", weight_decays), out=decays)
        self.noise.begin([self._key(direction) for direction in range(self.directions)], steps)

        def update() -> None:
            for unit in self._active_units():
                self._update(unit, decays[unit.group] if weight_decays[unit.group] else None)

        with delay_sigint():
            self._new_rows.append(row)
            run("update", update, self.noise.generators)
            for group in self.param_groups:
                group["step"] += 1

    def _update(self, unit: Unit, decay: Tensor | None) -> None:
        """Multiply a unit's weights by 1 − decay and add their steps along the directions chosen by `noise.begin`."""
        residual = self._rounding_residual(unit)
        width = 1 if unit.marks is None else unit.weights[0].shape[1]
        factor = None
        if decay is not None:
            factor = 1 - (decay if unit.marks is None else decay * unit.marks[:, None])
        for part in self.noise.parts(unit):
            weights = unit.flat[part.span]
            exact = weights.float() if is_half(unit.dtype) else weights
            if residual is not None:
                exact += residual[part.span]
            if factor is not None:
                rows = slice(part.begin // width, part.end // width)
                exact.view(-1, width).mul_(factor if unit.marks is None else factor[rows])
            self.noise.add(unit, part, exact, exact)
            if residual is not None:
                weights.copy_(exact)
                torch.sub(exact, weights, out=residual[part.span])
            elif exact is not weights:
                if self.rounding == "stochastic":
                    key = key_of(self._key(-2), unit.name) + part.begin
                    exact = round_stochastically(exact, unit.dtype, self._generators.seed(unit.device, key))
                weights.copy_(exact)

    def _active_units(self) -> Iterator[Unit]:
        """Yield the units that take part in this step."""
        for unit in self.layout.units:
            if self.share == 1 or key_of(self._key(-1), unit.name) < self.share * 2**63:
                yield unit

    def _all_weights(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield every weight with its group's number and its name. An unnamed weight is named by its number."""
        numbers = map(str, count())
        for number, group in enumerate(self.param_groups):
            for weight, name in zip(group["params"], group.get("param_names", numbers), strict=False):
                yield number, name, weight

    def _key(self, direction: int) -> int:
        return key_of(self.seed, self.param_groups[0]["step"], direction)

    def _constant(self, name: str, values: Sequence[float]) -> Tensor:
        """Return numbers as an fp32 tensor on the weights' device. They are copied there only if they have changed."""
        known, device = self._constants.get(name), self.layout.units[0].device
        if known is None or known[0] != values or known[1].device != device:
            known = self._constants[name] = values, torch.tensor(values, dtype=torch.float32, device=device)
        return known[1]

    def _fixed(self, name: str, *shape: int) -> Tensor:
        """Return an fp32 tensor on the weights' device, in the same memory each time."""
        known, device = self._memory.get(name), self.layout.units[0].device
        if known is None or known.device != device:
            known = self._memory[name] = torch.empty(shape, dtype=torch.float32, device=device)
        return known

    def _rounding_residual(self, unit: Unit) -> Tensor | None:
        """Return the rounding residual [numel] of a unit in half precision, initially zeros, or None without one."""
        if self.rounding != "residual" or not is_half(unit.dtype):
            return None
        state = [self.state[weight] for weight in unit.weights]
        first, residual = state[0].get("rounding_residual"), self._residuals.get(unit)
        if first is None or residual is None or not is_same_memory(first, residual):
            residual = self._residuals[unit] = torch.zeros_like(unit.flat)
            for own, view in zip(state, unit.views(residual), strict=True):
                if "rounding_residual" in own:  # from a loaded state
                    view.copy_(own["rounding_residual"])
                own["rounding_residual"] = view
        return residual


@contextmanager
def delay_sigint() -> Iterator[None]:
    """Delay SIGINT, so that it interrupts neither the restoring of weights nor an update.

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
