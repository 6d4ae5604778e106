"""What all methods have in common that learn by MeZO (https://arxiv.org/abs/2305.17333): forward passes alone.

The paper's results rest on prompts: asked by one, a pretrained model is near an answer, and what is left is a direction
that a few noisy looks find. With a new head there is nothing to start from.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_spu.backbones import Batch, Head
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.checkpoints.fingerprint import checksum, fingerprint
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.base import Method
from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.mezo import MeZOOptimizer, NoiseName, Rows
from lit_spu.optim.trajectory import Recorder, Trajectory
from lit_spu.tasks.metrics import task_metrics


class ZerothOrder(Method):
    """A method whose trained weights learn by MeZO. It comes first among the bases, before the method itself.

    Dropout is off, and no gradient is ever made. Where the whole validation set is scored before training, as with
    `trainer.num_sanity_val_steps: -1`, that is the zero-shot score, and one at chance is warned of. What is done is
    written to `trajectory.mezo` in the directory of the run, step by step, unless the Trainer has neither a logger nor
    checkpoints: `lit_spu.replay` makes the trained weights of it.

    Args:
        head: The language-model head at the prompt's blank, or, as a control, a new classification head.
        lr: Learning rate.
        schedule: Of the learning rate: constant, as the paper has it, or linear warm-up and decay.
        objective: What is minimised: the loss; or what is maximised: one of the task's metrics, of each batch, which
            needs no gradient.
        epsilon: How far along a direction the loss is looked at.
        noise: What directions are made of: normal noise, as the paper's; signs; blocks of one table of normal noise;
            or matrices of rank one, which are never made, so that a step costs little more than its forward passes.
        directions: How many are looked along in a step, whose moves are averaged.
        shard_directions: With several devices, let each look along directions of its own, so many more in all.
        share: Of the weights, how many take part in a step, drawn anew for each (LeZO).
        rows: Move all of an embedding, or only the rows that a step's batch has read. A run that moves only those
            writes no trajectory, for it would have to hold them.
        normalize: Divide the slopes by the standard deviation of the step's losses (FZOO); then lr is of another size.
        weights: Start from what another run trained (a run directory, a checkpoint or an export), of the same weights:
            a ladder or LoRA by backpropagation, for one, to go on with a metric as the objective.
        trajectory: Go on from a trajectory, or from that of a run directory: its steps are taken as they were, and
            training starts behind them, at the same place in the data.

    Raises:
        UserError: if a number is out of range, another optimizer is asked for, or the task has no such metric; once it
            is set up, if the weights or the trajectory cannot be had or belong to something else.
    """

    check_every = 100
    """Steps between two checks that the weights are the same on all ranks."""

    @abstractmethod
    def __init__(
        self,
        head: Head = "prompt",
        lr: float = 1e-5,
        schedule: Literal["constant", "linear"] = "constant",
        objective: str = "loss",
        epsilon: float = 1e-3,
        noise: NoiseName = "gaussian",
        directions: int = 1,
        shard_directions: bool = False,
        share: float = 1.0,
        rows: Rows = "all",
        normalize: bool = False,
        weights: str | None = None,
        trajectory: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head, lr=lr, **kwargs)
        if self.optimizer != "adamw":
            raise UserError(f"model.optimizer={self.optimizer}: MeZO is itself the optimizer. Leave the setting out.")
        if epsilon <= 0 or directions < 1 or not 0 < share <= 1:
            raise UserError(
                f"model.epsilon={epsilon} must be above 0, model.directions={directions} at least 1, and"
                f" model.share={share} above 0 and at most 1."
            )
        if objective not in (known := ("loss", *self.task.metrics)):
            raise UserError(f"model.objective={objective} of {self.task.name}: {did_you_mean(objective, known)}")
        if trajectory and rows == "seen":
            raise UserError("model.rows=seen: a trajectory holds no rows, so none can go on with them. Use rows=all.")
        self.schedule, self.objective, self.weights, self.trajectory = schedule, objective, weights, trajectory
        self.epsilon, self.noise, self.directions = epsilon, noise, directions
        self.shard_directions, self.share, self.rows, self.normalize = shard_directions, share, rows, normalize
        self.automatic_optimization = False
        self.zero_shot: float | None = None
        self._constant: list[Any] = []  # before training, what every constant answer scores
        self._scored = 0  # of how many
        self._recorder: Recorder | None = None

    @classmethod
    def check_trainer(cls, settings: Mapping[str, Any]) -> None:
        refused = {
            "gradient_clip_val": "there is no gradient to clip. --model.normalize makes steps of like length",
            "accumulate_grad_batches": "there is no gradient to accumulate. Take a larger --data.batch_size",
            "precision": "its scaler has no gradient to scale. bf16-mixed needs none, nor does 16-true, whose weights"
            " keep what an update leaves over",
            "strategy": "each device must hold all of the weights. ddp exchanges three numbers a step",
        }
        allowed = {
            "gradient_clip_val": lambda given: not given,
            "accumulate_grad_batches": lambda given: given in (None, 1),
            "precision": lambda given: str(given) not in ("16", "16-mixed"),
            "strategy": lambda given: not re.search("fsdp|deepspeed|model_?parallel", str(given), re.IGNORECASE),
        }
        for name, reason in refused.items():
            if not allowed[name](given := settings.get(name)):
                raise UserError(f"trainer.{name}={given}: {cls.__name__} makes no gradients, and {reason}.")

    def value(self, batch: Batch) -> Tensor:
        """What MeZO minimises, a scalar."""
        return self.objective_of(self(batch), batch)

    def objective_of(self, scores: Tensor, batch: Batch) -> Tensor:
        """What scores [batch, labels] come to: their loss, or how far a metric is from 1."""
        if self.objective == "loss":
            return self.backbone.loss(scores, batch)
        metric = task_metrics(self.task)[self.objective].to(self.device)
        prediction, _ = self.backbone.predict(scores)
        found: Tensor = metric(prediction, batch["labels"])
        return 1 - found.nan_to_num(0.0)

    def take_step(self, batch: Batch, *optimizers: Any) -> Tensor | None:
        """Take a step on a batch; gives what was minimised, or nothing where the step was a recorded one."""
        found: Tensor | None = optimizers[0].step(closure=lambda: self.value(batch), num_examples=len(batch["labels"]))
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.take_step(batch, *optimizers)
        if loss is not None:
            self.log("train/loss", loss.float(), prog_bar=True, batch_size=len(batch["input_ids"]))
        if left_out := optimizers[0].num_skipped_directions:
            self.log("train/left_out", float(left_out), prog_bar=True)
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            self.step_rate(scheduler)

    def step_rate(self, scheduler: Any) -> None:
        """Log a learning rate, and go on to that of the next step."""
        self.log("lr", scheduler.get_last_lr()[0])
        scheduler.step()

    def perturbed(self) -> list[tuple[str, nn.Parameter]]:
        """The weights that learn by MeZO, with their names."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def mezo(self, **settings: Any) -> MeZOOptimizer:
        """MeZO over them, with `settings` in place of the method's own."""
        groups: list[dict[str, Any]] = [{"params": self.perturbed()}]
        if self.weight_decay:  # of matrices alone
            matrices, others = ([(n, p) for n, p in self.perturbed() if (p.ndim > 1) is of] for of in (True, False))
            groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others}]
        own: dict[str, Any] = {
            name: getattr(self, name) for name in ("lr", "epsilon", "noise", "directions", "share", "rows", "normalize")
        }
        return MeZOOptimizer([group for group in groups if group["params"]], **own | settings)

    def configure_optimizers(self) -> Any:
        """MeZO over what is trained, with the same seed on all ranks, and its learning rate by step."""
        strategy: Any = self.trainer.strategy
        optimizer = self.mezo(
            seed=strategy.broadcast(torch.initial_seed()),
            reduce=lambda sums: strategy.reduce(sums, reduce_op="sum"),
            shard=(self.global_rank, self.trainer.world_size) if self.shard_directions else (0, 1),
        )
        if self.trajectory:
            trajectory = Trajectory.read(self.trajectory)
            if not self.trainer.ckpt_path:  # else its weights are those of a later step
                self._follow(optimizer, trajectory)
            optimizer.replay_rows = trajectory.rows
            rank_zero_info(f"The first {len(trajectory.rows):,} steps are those of {trajectory.file}.")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.rates(optimizer), "interval": "step"}}

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode always: two looks at the loss must differ by the weights alone."""
        super().train(False)
        return self

    # -- before training --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.weights and stage in ("fit", "replay"):
            trained_weights.restore(self, run_dir.checkpoint(self.weights, "best"))
            self.total_steps = None  # these were the other run's
        if stage == "fit":
            self.check_trainer({"precision": self.trainer.precision, "strategy": type(self.trainer.strategy).__name__})

    def _evaluate(self, batch: Batch, prefix: str) -> None:
        super()._evaluate(batch, prefix)
        if self.trainer.sanity_checking and prefix == "val/":
            self._constant = self._constant or [task_metrics(self.task).to(self.device) for _ in self.task.labels]
            self._scored += len(batch["labels"]) * self.trainer.world_size
            for label, metrics in enumerate(self._constant):
                for name in self.task.metrics:
                    metrics[name].update(torch.full_like(batch["labels"], label), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking and self.trainer.num_sanity_val_batches == self.trainer.num_val_batches:
            self._look_before_training(self.task.metrics[0])
        super().on_validation_epoch_end()

    def _look_before_training(self, metric: str) -> None:
        """Tell what is answered before training, and warn where that is within two standard errors of chance."""
        score = float(self.metrics["val/"][metric].compute().nan_to_num(0.0))
        chance = max((float(metrics[metric].compute()) for metrics in self._constant), default=0.0)
        said = f"Before training, {metric} is {score:.4f}; a constant answer has {chance:.4f}."
        if score > chance + 1 / math.sqrt(self._scored):
            rank_zero_info(said)
        else:
            rank_zero_warn(
                f"{said} MeZO starts from what a prompt brings, and here that is next to nothing: is the language-model"
                " head a trained one, and does the template suit the task?"
            )
        self.zero_shot = score

    def on_train_start(self) -> None:
        if self.zero_shot is not None:
            self.log(f"zero_shot/{self.task.metrics[0]}", self.zero_shot)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asked on every rank
        keeps = self.trainer.loggers or self.trainer.checkpoint_callbacks  # who wants no file gets none
        if self.recorded and keeps and self.trainer.is_global_zero:
            optimizer: Any = self.optimizers()
            self._recorder = Recorder(folder, self._header(optimizer.optimizer), optimizer.optimizer)

    # -- the trajectory ---------------------------------------------------------------------------------------------

    @property
    def recorded(self) -> bool:
        """Whether a run can write a trajectory."""
        return self.rows == "all"

    def replay(self, trajectory: Trajectory, step: int | None = None) -> None:
        """Take the first steps of a trajectory, or all, from the weights from which its run started.

        Raises:
            UserError: if the weights are others, z is something else here, or there are not so many steps.
        """
        rows, said = trajectory.first(step), trajectory.header
        self.setup("replay")
        self.to(said["device"] if said["device"] != "cuda" or torch.cuda.is_available() else "cpu")
        optimizer = self.mezo(directions=said["directions"])
        self._follow(optimizer, trajectory)
        for row in rows:
            optimizer.replay_step(row)
        self.cpu()

    def _follow(self, optimizer: MeZOOptimizer, trajectory: Trajectory) -> None:
        """Let an optimizer that has taken no step draw what a run drew.

        Raises:
            UserError: if it would not lead where the run was led.
        """
        ours, its, file = self._header(optimizer), trajectory.header, trajectory.file
        if ours["backbone"]["fingerprint"] != its["backbone"]["fingerprint"]:
            raise UserError(
                f"{file} starts from the backbone {its['backbone']['name']!r} (fingerprint"
                f" {its['backbone']['fingerprint']}), not from {ours['backbone']['name']!r}"
                f" ({ours['backbone']['fingerprint']})."
            )
        if any(ours[name] != its[name] for name in ("method", "groups", "directions", "initial_fingerprint")):
            raise UserError(
                f"{file} starts from other weights than these ({its['method']}, {its['initial_fingerprint']}; here"
                f" {ours['method']}, {ours['initial_fingerprint']}): take the run's own settings, and seed"
                f" {its['seed']}."
            )
        if ours["noise"] != its["noise"]:
            raise UserError(
                f"{file}: z is something else here. It depends on model.noise and model.share, and normal and low-rank"
                f" noise also on the device ({its['device']}) and the version of torch ({its['torch']}; here"
                f" {ours['torch']}). The noise `table` is the same everywhere."
            )
        optimizer.seed = its["seed"]

    def _header(self, optimizer: MeZOOptimizer) -> dict[str, Any]:
        """What has to be known to take an optimizer's steps again."""
        said = self.described()
        del said["state_dict"]
        noise = optimizer.noise.sample(key_of("header"), torch.empty(64, 64, device=self.device))
        return said | {
            "groups": len(optimizer.param_groups),
            "directions": optimizer.directions,
            "seed": optimizer.seed,
            "initial_fingerprint": optimizer.initial_fingerprint,
            "noise": fingerprint([(f"{optimizer.noise} {optimizer.share}", noise)]),
            "device": self.device.type,
            "torch": str(torch.__version__),
        }

    def on_train_batch_end(self, *args: Any) -> None:
        if self._recorder:
            self._recorder.append()
        if self.trainer.world_size > 1 and self.trainer.global_step % self.check_every == 0:
            sums: Any = self.all_gather(checksum(p for _, p in self.perturbed()))
            if (sums != sums[0]).any():
                raise RuntimeError(
                    f"The weights differ between the ranks behind step {self.trainer.global_step}: was something other"
                    " than the optimizer's step made on one of them?"
                )
