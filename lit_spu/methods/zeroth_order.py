"""Base class of methods that are trained by MeZO (https://arxiv.org/abs/2305.17333): by forward passes alone.

MeZO needs a prompt that the pretrained model can nearly answer already. Then a few noisy directions are enough. With a
new classification head they are not.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_spu.backbones import Batch, Head
from lit_spu.callbacks.rank_check import RankCheck
from lit_spu.callbacks.trajectory_recorder import TrajectoryRecorder
from lit_spu.callbacks.zero_shot_report import ZeroShotReport
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError, did_you_mean, name_flag
from lit_spu.methods.base import Method
from lit_spu.methods.teacher import check_same_labels
from lit_spu.optim.mezo import MeZOOptimizer, NoiseName, Rows
from lit_spu.optim.replay import check_replayable
from lit_spu.optim.rounding import Rounding
from lit_spu.optim.trajectory import Trajectory
from lit_spu.ranges import Count, Positive, PositiveShare, Text
from lit_spu.tasks import load_task
from lit_spu.tasks.metrics import task_metrics


class ZerothOrder(Method):
    """Base class of methods whose weights are trained by MeZO. A subclass names it first among its bases.

    Dropout is off, and no gradient is computed. If the whole validation set is scored before training, as with
    `trainer.num_sanity_val_steps: -1`, the result is logged as the zero-shot score, with a warning if it is at chance.
    Each step is recorded in `trajectory.mezo` in the run directory, unless the Trainer has neither a logger nor
    checkpoints. `lit_spu.replay` computes the trained weights from it.

    Args:
        head: The language-model head at the prompt's blank (`prompt`), or, as a control, a new classification head
            (`classifier`). A T5 may also answer by its labels' names (`names`).
        lr: Learning rate.
        schedule: A constant learning rate, as in the paper, or linear warm-up and decay.
        objective: `loss`, which is minimised, or one of the task's metrics, which is maximised on each batch.
        epsilon: Perturbation scale ε.
        noise: Distribution of the directions: normal noise, as in the paper; random signs; or matrices of rank one,
            whose few factors are drawn, so that a step costs little more than its forward passes.
        directions: Number of directions per step. Their updates are averaged.
        shard_directions: Evaluate different directions on each device, for more directions in total.
        share: Share of the weights that take part in a step, drawn for each step: whole blocks and token embeddings, as
            in LeZO, and other weights one by one.
        rows: Update `all` rows of the token embeddings, or only those `seen` in the step's batch. With `seen`, no
            trajectory is recorded, because it would have to hold the rows.
        normalize: Divide the slopes by the standard deviation of the step's losses (FZOO). The learning rate then has
            another scale.
        rounding: Rounding of updated weights in half precision (`trainer.precision` of bf16-true or 16-true):
            `residual` stores the rounding errors in as much memory as the weights take, so that small updates add up;
            `stochastic` rounds up or down at random, so that they add up in the mean; `nearest` loses them.
        weights: Initial weights: a run directory, a checkpoint or an export of the same trained weights. For example, a
            LoRA that was trained by backpropagation can be trained further with a metric as the objective.
        trajectory: A trajectory to continue, or a run directory that has one. Its steps are replayed, and training
            continues after them with the next batch of the data.

    Raises:
        UserError: If a number is out of range, another optimizer is chosen, or the task has no such metric. Before
            training, if the weights or the trajectory do not exist or do not fit.
    """

    captures_own_steps = True

    check_every = 100
    """Steps between two checks that the weights are equal on all ranks."""

    @abstractmethod
    def __init__(
        self,
        head: Head = "prompt",
        lr: Positive = 1e-5,
        schedule: Literal["constant", "linear"] = "constant",
        objective: Text = "loss",
        epsilon: Positive = 1e-3,
        noise: NoiseName = "gaussian",
        directions: Count = 1,
        shard_directions: bool = False,
        share: PositiveShare = 1.0,
        rows: Rows = "all",
        normalize: bool = False,
        rounding: Rounding = "residual",
        weights: Text | None = None,
        trajectory: Text | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head, lr=lr, **kwargs)
        if self.optimizer != "adamw":
            raise UserError(f"model.optimizer={self.optimizer}: MeZO is the optimizer. Leave the setting out.")
        if objective not in (known := ("loss", *self.task.metrics)):
            raise UserError(f"model.objective={objective} of {self.task.name}: {did_you_mean(objective, known)}")
        if trajectory and rows == "seen":
            raise UserError("model.rows=seen: a trajectory does not hold the rows that a batch reads. Use rows=all.")
        self.schedule, self.objective, self.weights, self.trajectory = schedule, objective, weights, trajectory
        self.epsilon, self.noise, self.directions = epsilon, noise, directions
        self.shard_directions, self.share, self.rows, self.normalize = shard_directions, share, rows, normalize
        self.rounding = rounding
        self.automatic_optimization = False

    @classmethod
    def check_trainer(cls, settings: Mapping[str, Any]) -> None:
        reasons = {
            "gradient_clip_val": "there is no gradient to clip. --model.normalize makes steps of similar length",
            "accumulate_grad_batches": "there is no gradient to accumulate. Use a larger --data.batch_size",
            "precision": "its scaler needs gradients. bf16-mixed has no scaler, nor has 16-true, where --model.rounding"
            " keeps small updates",
            "strategy": "each device must hold all weights. ddp exchanges three numbers per step",
        }
        is_allowed = {
            "gradient_clip_val": lambda given: not given,
            "accumulate_grad_batches": lambda given: given in (None, 1),
            "precision": lambda given: str(given) not in ("16", "16-mixed"),
            "strategy": lambda given: not re.search("fsdp|deepspeed|model_?parallel", str(given), re.IGNORECASE),
        }
        for name, reason in reasons.items():
            if not is_allowed[name](given := settings.get(name)):
                raise UserError(f"trainer.{name}={given}: {cls.__name__} computes no gradients, and {reason}.")

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks of every run by MeZO. Lightning adds them to the Trainer's."""
        recorder = [TrajectoryRecorder()] if self.rows == "all" else []
        return [ZeroShotReport(), *recorder, RankCheck(self.check_every)]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._load_initial_weights()
            self.check_trainer({"precision": self.trainer.precision, "strategy": type(self.trainer.strategy).__name__})

    def checkpoint_dict(self) -> dict[str, Any]:
        """Return the method's part of a checkpoint and, in training, the fingerprint of the data."""
        data: Any = getattr(self._trainer, "datamodule", None)
        known = {"data": data.fingerprint()} if hasattr(data, "fingerprint") else {}
        return super().checkpoint_dict() | known

    def _load_initial_weights(self) -> None:
        if self.weights:
            with name_flag("--model.weights"):
                file = run_dir.find_checkpoint(self.weights, "best")
                if self.backbone.has_classifier:  # its head is among the weights
                    trained_for = load_task(run_dir.saved_config(file)["data"]["task"])
                    check_same_labels(self.weights, trained_for, self.task)
                trained_weights.restore_weights(self, file)
            self.total_steps = None  # the checkpoint's number is that of the other run

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, MeZOOptimizer):
                optimizer.release()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the losses of a step must differ by the weights alone."""
        super().train(False)
        return self

    def objective_value(self, batch: Batch) -> Tensor:
        """Return the value that MeZO minimises, a scalar."""
        return self.objective_from(self(batch), batch)

    def objective_from(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the value that MeZO minimises from logits [batch, labels]: the loss, or 1 minus a metric.

        It is infinite if a metric is the objective and a logit is not finite, and NaN if the metric is undefined on
        this batch. MeZO skips the direction then.
        """
        if self.objective == "loss":
            return self.backbone.loss(logits, batch)
        metric = task_metrics(self.task)[self.objective].to(self.device)
        prediction, _ = self.backbone.predict(logits)
        value: Tensor = metric(prediction, batch["labels"])
        return (1 - value).where(logits.isfinite().all(), torch.inf)

    def take_step(self, batch: Batch, *optimizers: Any) -> Tensor | None:
        """Take a step on a batch.

        Returns:
            The mean objective value, or None if the step was replayed or its metric was undefined.
        """
        settings: dict[str, Any] = {"num_examples": len(batch["labels"])}
        fixed = self.copy_batch(batch)
        if fixed is not None and self.graphs:
            batch, settings["run"] = fixed, self.graphs.run
        value: Tensor | None = optimizers[0].step(closure=self.make_closure(batch), **settings)
        # waits for the device, as metrics do; the loss is never undefined
        is_undefined = self.objective != "loss" and value is not None and bool(value.isnan())
        return None if is_undefined else value

    def graph_obstacle(self) -> str | None:
        return super().graph_obstacle() or self._find_obstacle()

    def is_capturable(self, batch: Batch) -> bool:
        return self.captures_own_steps and self._find_obstacle() is None and super().is_capturable(batch)

    def _find_obstacle(self) -> str | None:
        """Return why evaluations and updates cannot be captured as graphs, or None."""
        obstacles = {
            "each step draws other weights (model.share)": self.share < 1,
            "updates depend on the rows that are read (model.rows=seen)": self.rows == "seen",
            f"a metric's values are read (model.objective={self.objective})": self.objective != "loss",
            "updates seed generators (model.rounding=stochastic)": self.rounding == "stochastic",
        }
        return next((reason for reason, holds in obstacles.items() if holds), None)

    def make_closure(self, batch: Batch) -> Callable[[], Tensor]:
        """Return a function that computes the objective value of a batch at the present weights."""
        return partial(self.objective_value, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.take_step(batch, *optimizers)
        if loss is not None:
            self.log_loss(loss.float())
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            self.step_lr_scheduler(scheduler)
        self.flush_step()

    def _hand_over(self) -> None:
        """Log the number of skipped directions too, if there are any. Reading it waits for the device."""
        optimizer: Any = self.trainer.optimizers[0]
        if num_skipped := optimizer.num_skipped_directions:
            self.log_step("train/left_out", num_skipped, prog_bar=True)
        super()._hand_over()

    def step_lr_scheduler(self, scheduler: Any) -> None:
        """Log a learning rate and advance it to the next step's."""
        self.log_step("lr", scheduler.get_last_lr()[0])
        scheduler.step()

    def perturbed_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the weights that are trained by MeZO, with their names."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def make_optimizer(self, **settings: Any) -> MeZOOptimizer:
        """Return MeZO over `perturbed_parameters`. `settings` take precedence over the method's own."""
        groups: list[dict[str, Any]] = [{"params": self.perturbed_parameters()}]
        if self.weight_decay:  # of matrices alone
            named = self.perturbed_parameters()
            matrices, others = ([(n, p) for n, p in named if (p.ndim > 1) is is_matrix] for is_matrix in (True, False))
            groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others}]
        names = ("lr", "epsilon", "noise", "directions", "share", "rows", "normalize", "rounding")
        own = {name: getattr(self, name) for name in names}
        own |= {"blocks": self.backbone.blocks, "table_readers": self.backbone.table_readers}
        return MeZOOptimizer([group for group in groups if group["params"]], **own | settings)

    def configure_optimizers(self) -> Any:
        """Return MeZO over the trained weights, with the same seed on all ranks, and its learning rate by step."""
        strategy: Any = self.trainer.strategy
        optimizer = self.make_optimizer(
            seed=strategy.broadcast(torch.initial_seed()),
            reduce=partial(strategy.reduce, reduce_op="sum") if self.trainer.world_size > 1 else None,
            shard=(self.global_rank, self.trainer.world_size) if self.shard_directions else (0, 1),
        )
        if self.trajectory:
            trajectory = Trajectory.read(self.trajectory)
            if not self.trainer.ckpt_path:  # a resumed run's weights are already those of a later step
                check_replayable(trajectory, self.checkpoint_dict(), optimizer)
                optimizer.seed = trajectory.header["seed"]
            optimizer.replay_rows = trajectory.rows
            rank_zero_info(f"The first {len(trajectory.rows):,} steps are replayed from {trajectory.file}.")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def replay(self, trajectory: Trajectory, step: int | None = None) -> None:
        """Compute the weights of a run after a step from its trajectory. The method must hold its initial weights.

        Args:
            trajectory: The run's trajectory.
            step: Number of steps to replay; None replays all.

        Raises:
            UserError: If the weights or the noise differ from the run's, or there are fewer steps.
        """
        rows, header = trajectory.first(step), trajectory.header
        self._load_initial_weights()
        self.to(header["device"] if header["device"] != "cuda" or torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, header["dtype"])
        if self.perturbed_parameters()[0][1].dtype is not dtype:
            self.to(dtype)  # as the Trainer does in half precision
        optimizer = self.make_optimizer(directions=header["directions"])
        check_replayable(trajectory, self.checkpoint_dict(), optimizer)
        optimizer.seed = header["seed"]
        for row in rows:
            optimizer.replay_step(row)
        optimizer.release()
        self.is_trained = True
        self.cpu()
