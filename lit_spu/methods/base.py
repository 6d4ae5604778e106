"""Base class of methods: backbone and task, training step, metrics, merging and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.profiler import record_function

from lit_spu.backbones import Batch, FrozenStates, Head, load_backbone
from lit_spu.errors import NonFiniteError, UserError
from lit_spu.methods.finite import check_weights
from lit_spu.methods.step_graphs import CapturedSteps
from lit_spu.nn.adapter import Adapter
from lit_spu.optim import schedules
from lit_spu.optim.adamw import fused_adamw
from lit_spu.ranges import Checked, Positive, PositiveOrZero, Share, Text
from lit_spu.tasks import Encoding, load_task
from lit_spu.tasks.metrics import CALIBRATED, task_metrics

StepLoss = Callable[[Batch], Tensor | None]

_SEEDS = 64


@lru_cache(maxsize=64)  # several siblings have their own seeds
def _batch_seeds(seed: int, rank: int, block: int) -> list[int]:
    """Return the seeds of a block of batches. Seeds one by one take ten times as long, because caches are cold."""
    keys = (np.random.SeedSequence((seed, rank, block * _SEEDS + number)) for number in range(_SEEDS))
    return [int(key.generate_state(1, np.uint64)[0]) for key in keys]


class Method(Checked, CapturedSteps, ABC):
    """Base class of fine-tuning methods.

    A subclass freezes and adds weights in its constructor. If needed, it overrides `forward`, `loss` or other methods.

    Args:
        backbone: An embedded mini model (mini-bert, mini-t5), or a Hugging Face name or folder.
        task: A task's name, or a YAML file with your own. On the command line it is taken from `data.task`.
        head: A classification head, new unless the backbone has one for these labels (`classifier`); or the
            language-model head, which answers by a label word at the prompt's blank (`prompt`), or, T5 only, by a
            label's name as in its pretraining (`names`).
        lr: Peak learning rate.
        optimizer: AdamW, or Adafactor, whose step is scaled by the size of each weight.
        weight_decay: Decoupled weight decay of matrices; biases and norms have none.
        warmup: Share of all steps over which the learning rate rises, before it falls to zero linearly.
        gradient_checkpointing: Recompute the blocks in the backward pass instead of saving their activations.
        cuda_graphs: On a CUDA device, capture the forward and backward pass of a step (in MeZO, an evaluation and the
            update) once for each shape of a batch, and replay it. Batches are padded to multiples of eight tokens.
            Steps that cannot be captured run as usual, and the log says why.

    Raises:
        UserError: If the backbone or the task does not exist, or they do not fit each other.
    """

    schedule: Literal["constant", "linear"] = "linear"

    step_wrapper: Callable[[StepLoss, Batch], Tensor | None] | None = None
    """Set by a callback to wrap the training step: called with `step_loss` and the batch, it returns the loss."""

    @abstractmethod
    def __init__(
        self,
        backbone: Text = "mini-bert",
        task: Text | dict = "sst2",  # type: ignore[type-arg]  # jsonargparse reads texts inside a dict[str, Any] as YAML
        head: Head = "classifier",
        lr: Positive = 1e-3,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        weight_decay: PositiveOrZero = 0.0,
        warmup: Share = 0.06,
        gradient_checkpointing: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup, self.optimizer = lr, weight_decay, warmup, optimizer
        self.task = load_task(task)
        self.backbone = load_backbone(backbone, self.task, head)
        if gradient_checkpointing:
            self.backbone.base_model.enable_gradient_checkpointing()
        self.cuda_graphs = cuda_graphs
        self.metrics: dict[str, Any] = {}
        self.total_steps: int | None = None
        self.seed = 0
        self.is_trained = False
        self._trained_names: set[str] = set()

    # -- what a method may override -----------------------------------------------------------------------------------

    @classmethod
    def check_trainer(cls, settings: Mapping[str, Any]) -> None:
        """Check the Trainer's settings before a model is loaded.

        Raises:
            UserError: If the method cannot train with them.
        """

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [batch, labels]."""
        with record_function("backbone"):
            logits: Tensor = self.backbone(batch, self.frozen_states(batch))
        return logits

    def frozen_states(self, batch: Batch) -> FrozenStates | None:
        """Return cached hidden states of the lowest blocks, which then do not run; None if there is no cache."""
        return None

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar."""
        return self.backbone.loss(self(batch), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.step_wrapper is None:
            return self.step_loss(batch)
        return self.step_wrapper(self.step_loss, batch)

    def step_loss(self, batch: Batch) -> Tensor | None:
        """Return the loss of a training step and log it; None skips the backward pass."""
        loss = self.captured_loss(batch)
        self.log_loss(loss)
        self.log_step("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass in the default dtype of the forward pass, for blocks that are recomputed in it.

        In mixed precision, recomputed blocks restore autocast themselves.
        """
        if self.set_captured_gradients():
            return
        trainer: Any = self.trainer
        is_mixed = str(trainer.precision).endswith("mixed")
        with nullcontext() if is_mixed else trainer.precision_plugin.forward_context():
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step and free the gradients. Lightning would hold them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trained weights, and its learning rate by step."""
        groups = self.parameter_groups()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = fused_adamw(groups, self.lr)
        else:
            optimizer = torch.optim.Adafactor(groups, lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return the schedule of the learning rate by step."""
        if self.schedule == "constant":
            return ConstantLR(optimizer, 1.0)
        return schedules.linear(optimizer, self.warmup, self._count_steps())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained weights with their learning rate and weight decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay, "lr": self.lr},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": self.lr},
        ]
        if not trained:
            raise UserError(f"{type(self).__name__} has no weights to train: a callback has frozen all of them.")
        return [group for group in groups if group["params"]]

    def _count_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                "The learning rate falls to zero over the whole run, but this run has no end:"
                " set --trainer.max_epochs or --trainer.max_steps."
            )
        if self.total_steps not in (None, int(steps)):
            rank_zero_warn(
                f"This run is resumed with {int(steps)} steps in total instead of {self.total_steps}:"
                " the learning rate follows the new schedule from here on."
            )
        self.total_steps = int(steps)
        return self.total_steps

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def encoding(self) -> Encoding:
        """The form in which the backbone reads examples, for the data module."""
        return self.backbone.encoding

    def setup(self, stage: str) -> None:
        self._trained_names = self._trainable_names()

    def on_fit_start(self) -> None:
        self.train()  # from_pretrained leaves models in evaluation mode, and Lightning does not change it
        super().on_fit_start()
        self.zero_grad()
        self.seed = torch.initial_seed()

    @property
    def takes_plain_steps(self) -> bool:  # type: ignore[override]
        """True if a step is a loss, its backward pass and an update of the weights."""
        return self.automatic_optimization and type(self).step_loss is Method.step_loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by the run's seed, the rank and the batch, so that a resumed run draws the same masks."""
        self.is_trained = True
        self.seed_generators(self.batch_seed(self.seed))

    def batch_seed(self, seed: int) -> int:
        """Return a seed for this training batch on this rank, derived from a seed of the run."""
        # the batches completed, not those started: a resumed run starts an interrupted batch again
        completed = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
        block, number = divmod(completed, _SEEDS)
        return _batch_seeds(seed, self.global_rank, block)[number]

    @property
    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """The backbone's weights at each depth: of the embeddings, then of each block with its adapters.

        The head and side networks are not included.
        """
        base_model, adapters = self.backbone.base_model, self.adapters
        found = [[parameter for part in base_model.embeddings for parameter in part.parameters()]]
        for block in base_model.blocks:
            inside = set(block.modules())
            attached = (adapter for adapter in adapters if adapter.target.linear in inside)
            found.append([*block.parameters(), *(p for adapter in attached for p in adapter.parameters())])
        return found

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate_batch(batch, self._metric_prefix("val", dataloader_idx))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate_batch(batch, self._metric_prefix("test", dataloader_idx))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the examples' row numbers, their predictions [batch] and their probabilities [batch, labels]."""
        logits = self(batch)
        if not logits.isfinite().all():
            raise NonFiniteError(f"Some logits are not finite, so there is no prediction. {self.advise(0)}")
        prediction, probabilities = self.backbone.predict(logits)
        return {"index": batch["index"], "prediction": prediction, "scores": probabilities}

    def _metric_prefix(self, stage: str, dataloader_idx: int) -> str:
        """Return a prefix such as `val/`, or for a validation set with a name `val/mismatched_`."""
        part_names = getattr(getattr(self.trainer, "datamodule", None), "part_names", None)
        names = part_names("validation" if stage == "val" else stage) if part_names else [""]
        name = names[dataloader_idx] if dataloader_idx < len(names) else str(dataloader_idx)
        return f"{stage}/{name}_" if name else f"{stage}/"

    @property
    def is_zero_shot(self) -> bool:
        """True if the logits are those of the pretrained model's label words: nothing was trained or loaded."""
        return not (self.is_trained or self.backbone.has_classifier) and type(self).forward is Method.forward

    def evaluate_batch(self, batch: Batch, prefix: str) -> None:
        """Compute the logits of a batch and add them to the metrics of this prefix."""
        self.update_metrics(self(batch), batch, prefix)

    def update_metrics(self, logits: Tensor, batch: Batch, prefix: str) -> None:
        """Add the logits [batch, labels] of a batch to the metrics of this prefix."""
        labels = batch["labels"]
        if prefix not in self.metrics:
            calibrated = self.is_zero_shot and not self.task.regression
            self.metrics[prefix] = task_metrics(self.task, calibrated).to(self.device)
        # the loss is a metric because Lightning's own mean over ranks rounds the number of examples
        loss = self.backbone.loss(logits, batch)  # finite even for some infinite logits
        self.metrics[prefix]["loss"].update(loss.where(logits.isfinite().all(), torch.nan), len(labels))
        prediction, _ = self.backbone.predict(logits)
        for name in self.task.metrics:
            self.metrics[prefix][name].update(prediction, labels)
            if (calibrated_name := f"{name}{CALIBRATED}") in self.metrics[prefix]:
                self.metrics[prefix][calibrated_name].update(logits, labels)

    def compute_metrics(self) -> dict[str, Tensor]:
        """Return all metrics by their logged names and reset them. A correlation that is undefined is NaN."""
        values = {
            f"{prefix}{name}": value
            for prefix, metrics in self.metrics.items()
            for name, value in metrics.compute().items()
        }
        self.metrics.clear()
        return values

    def log_metrics(self) -> None:
        """Log all metrics of an epoch."""
        self.log_scores(self.compute_metrics(), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.log_metrics()

    def on_test_epoch_end(self) -> None:
        self.log_metrics()

    # -- merging ------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters on linear layers of the backbone."""
        return [module for module in self.modules() if isinstance(module, Adapter)]

    def merge(self) -> None:
        """Add the adapters to the backbone's weights: the same logits at the cost of the backbone alone.

        Raises:
            UserError: If the logits depend on more than the backbone's weights.
        """
        if type(self).forward is not Method.forward:
            raise UserError(
                f"{type(self).__name__} cannot be merged: it trains a network beside the backbone. Export it as"
                " safetensors."
            )
        for adapter in self.adapters:
            adapter.merge()

    def unmerge(self) -> None:
        """Restore the backbone's weights to the bit."""
        for adapter in self.adapters:
            adapter.unmerge()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduce a checkpoint to the trained weights, and add the backbone's name and fingerprint.

        Raises:
            NonFiniteError: If a trained weight or a training loss is not finite. Then no file is written.
        """
        self.check_local_losses()
        state, trained = checkpoint["state_dict"], self._trained_names or self._trainable_names()
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        check_weights(checkpoint["state_dict"], "No checkpoint is saved")
        checkpoint["backbone"] = {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint}
        checkpoint["method"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["total_steps"] = self.total_steps
        given = self.hparams["task"]
        task = given if given == self.task.name else self.task.to_dict()  # its YAML file may be gone later
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), "task": task}

    def checkpoint_dict(self) -> dict[str, Any]:
        """Return the method's part of a checkpoint: trained weights, settings and backbone."""
        checkpoint: dict[str, Any] = {"state_dict": self.state_dict(), "hyper_parameters": dict(self.hparams)}
        self.on_save_checkpoint(checkpoint)
        return checkpoint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and add the frozen weights, so that Lightning's strict loading finds all weights.

        Raises:
            UserError: If the checkpoint belongs to another backbone or another method, or a weight is not finite.
        """
        stored: Mapping[str, str] = checkpoint.get("backbone", {})
        if stored.get("fingerprint") != self.backbone.fingerprint:
            raise UserError(
                f"This checkpoint was trained on the backbone {stored.get('name')!r} (fingerprint"
                f" {stored.get('fingerprint')}), not on {self.backbone.name!r} ({self.backbone.fingerprint})."
            )
        state, own = checkpoint["state_dict"], self.state_dict()
        wrong = sorted((set(state) - set(own)) | (self._trainable_names() - set(state)))
        if wrong:
            raise UserError(
                f"This checkpoint was not made by {type(self).__name__} with these settings: {len(wrong)} of the"
                f" weights do not match ({', '.join(wrong[:3])}…)."
            )
        check_weights(state, "This checkpoint is of a failed training. Give an earlier one")
        checkpoint["state_dict"] = {**own, **state}
        self.total_steps = checkpoint.get("total_steps")
        self.is_trained = True
