"""What all methods share: a backbone, its task, a step, the metrics, and a checkpoint of what was trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.profiler import record_function

from lit_spu.backbones import Batch, Head, HiddenStates, Precision, load_backbone
from lit_spu.backbones.cache import ActivationCache
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter
from lit_spu.optim import schedules
from lit_spu.tasks import Encoding, load_task
from lit_spu.tasks.metrics import task_metrics


class Method(LightningModule, ABC):
    """A way to fine-tune. A subclass freezes, inserts or attaches in its constructor and overrides what it changes.

    Args:
        backbone: An embedded mini model (mini-bert, mini-t5), or a Hugging Face name or folder.
        task: A task's name, or the YAML file of one's own; on the command line it is that of the data.
        head: A new classification head, or the language-model head at the prompt's blank. T5 and causal models always
            answer by their language-model head.
        lr: Peak learning rate.
        optimizer: AdamW, or Adafactor with its step scaled by each weight's size.
        weight_decay: Decoupled weight decay of the matrices; biases and norms have none.
        warmup: Share of all steps over which the learning rate rises, before it falls to zero linearly.
        gradient_checkpointing: Recompute the blocks that train in the backward pass rather than store what they keep.

    Raises:
        UserError: if the backbone or the task cannot be had, or do not fit each other.
    """

    schedule: Literal["constant", "linear"] = "linear"

    @abstractmethod
    def __init__(
        self,
        backbone: str = "mini-bert",
        task: str | dict[str, Any] = "sst2",
        head: Head = "classifier",
        lr: float = 1e-3,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        weight_decay: float = 0.0,
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup, self.optimizer = lr, weight_decay, warmup, optimizer
        self.task = load_task(task)
        self.backbone = load_backbone(backbone, self.task, head)
        if gradient_checkpointing:
            self.backbone.base_model.recompute()
        self.metrics: dict[str, Any] = {}
        self.total_steps: int | None = None
        self.seed = 0

    # -- what a method may change -----------------------------------------------------------------------------------

    @classmethod
    def check_trainer(cls, settings: Mapping[str, Any]) -> None:
        """Refuse, before a model is loaded, settings of the Trainer that the method cannot do with.

        Raises:
            UserError: if there is such a one.
        """

    def forward(self, batch: Batch) -> Tensor:
        """Scores [batch, labels]."""
        with record_function("backbone"):
            scores: Tensor = self.backbone(batch)
        return scores

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch, a scalar."""
        return self.backbone.loss(self(batch), batch)

    step_wrapper: Callable[[Callable[[Batch], Tensor | None], Batch], Tensor | None] | None = None
    """Hook of callbacks: if set, it is called with `step_loss` and the batch, and its result is the step's loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.step_wrapper is None:
            return self.step_loss(batch)
        return self.step_wrapper(self.step_loss, batch)

    def step_loss(self, batch: Batch) -> Tensor | None:
        """Return the loss of a training step and log it; None skips the backward pass."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and drop the gradients at once: Lightning would keep them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trained, and linear warm-up and decay by step."""
        groups = self.parameter_groups()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        else:
            optimizer = torch.optim.Adafactor(groups, lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.rates(optimizer), "interval": "step"}}

    def rates(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """The learning rate by step: constant where a method's `schedule` says so, else linear warm-up and decay."""
        if self.schedule == "constant":
            return ConstantLR(optimizer, 1.0)
        return schedules.linear(optimizer, self.warmup, self._steps())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, with its learning rate and its weight decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay, "lr": self.lr},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": self.lr},
        ]
        return [group for group in groups if group["params"]]

    def _steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                "The learning rate falls to zero over the whole run, but this run has no end:"
                " set --trainer.max_epochs or --trainer.max_steps."
            )
        if self.total_steps not in (None, int(steps)):
            rank_zero_warn(
                f"This run is resumed with {int(steps)} steps in all instead of {self.total_steps}:"
                " the learning rate follows the new schedule from here on."
            )
        self.total_steps = int(steps)
        return self.total_steps

    # -- what is the same for all -----------------------------------------------------------------------------------

    @property
    def encoding(self) -> Encoding:
        """How the data module writes examples for this method's backbone."""
        return self.backbone.encoding

    def setup(self, stage: str) -> None:
        self.trained = {name for name, p in self.named_parameters() if p.requires_grad}

    def on_fit_start(self) -> None:
        self.train()  # from_pretrained leaves models in evaluation mode, and Lightning leaves them as they are
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout depend on the seed, the rank and the batch alone: a resumed run draws what it would have."""
        torch.manual_seed(self.batch_seed(self.seed))

    def batch_seed(self, seed: int) -> int:
        """What a seed comes to in this batch of training on this rank."""
        behind = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed  # a batch may be begun twice
        key = np.random.SeedSequence((seed, self.global_rank, behind))
        return int(key.generate_state(1, np.uint64)[0])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self._prefix("val", dataloader_idx))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self._prefix("test", dataloader_idx))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The rows' numbers [batch], predictions [batch] and scores [batch, labels]."""
        prediction, scores = self.backbone.predict(self(batch))
        return {"index": batch["index"], "prediction": prediction, "scores": scores}

    def _prefix(self, stage: str, dataloader_idx: int) -> str:
        """`val/`, or `val/mismatched_` where a task has a second validation set of that name."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", [""])
        name = names[dataloader_idx] if dataloader_idx < len(names) else str(dataloader_idx)
        return f"{stage}/{name}_" if name else f"{stage}/"

    def _evaluate(self, batch: Batch, prefix: str) -> None:
        labels, (low, _) = batch["labels"], self.task.score_range or (0.0, 0.0)
        if low > -1 and bool((labels == -1).all()):
            raise UserError("This split has no labels, so there is nothing to score: use predict.")
        if prefix not in self.metrics:
            self.metrics[prefix] = task_metrics(self.task).to(self.device)
        scores = self(batch)
        # the loss too is a metric of its own: Lightning's mean over ranks rounds the number of examples
        self.metrics[prefix]["loss"].update(self.backbone.loss(scores, batch), len(labels))
        prediction, _ = self.backbone.predict(scores)
        for name in self.task.metrics:
            self.metrics[prefix][name].update(prediction, labels)

    def _log_metrics(self) -> None:
        for prefix, metrics in self.metrics.items():
            for name, value in metrics.compute().items():
                # correlations are undefined where all predictions are equal, and count as none
                self.log(f"{prefix}{name}", value.nan_to_num(0.0), prog_bar=True, sync_dist=True)
        self.metrics.clear()

    def on_validation_epoch_end(self) -> None:
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        self._log_metrics()

    @property
    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """The backbone's weights at each depth, from the bottom up: the embeddings', and then those of block by block.

        What learns at a block's linears is among its own. The head, and what stands beside the backbone, is not there.
        """
        stem, adapters = self.backbone.base_model, self.adapters
        found = [[parameter for part in stem.embeddings for parameter in part.parameters()]]
        for block in stem.blocks:
            inside = set(block.modules())
            at = (adapter for adapter in adapters if adapter.target.linear in inside)
            found.append([*block.parameters(), *(parameter for one in at for parameter in one.parameters())])
        return found

    # -- merging ----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[Adapter]:
        """What learns at single linears of the backbone."""
        return [module for module in self.modules() if isinstance(module, Adapter)]

    def merge(self) -> None:
        """Write what was trained into the backbone's own weights: the same answers at the plain backbone's cost.

        Raises:
            UserError: if the method answers by more than the backbone's weights.
        """
        if type(self).forward is not Method.forward:
            raise UserError(
                f"{type(self).__name__} cannot be merged: what it trains stands beside the backbone and reads it, which"
                " no weight of the backbone can do. Export it as safetensors."
            )
        for adapter in self.adapters:
            adapter.merge()

    def unmerge(self) -> None:
        """Take it out again: the backbone's weights are what they were, to the bit."""
        for adapter in self.adapters:
            adapter.unmerge()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and name the backbone that it belongs to."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in self.trained}
        checkpoint["backbone"] = {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint}
        checkpoint["method"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["total_steps"] = self.total_steps
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), "task": self._task_spec()}

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the method, once it is set up: its trained weights, settings and backbone."""
        checkpoint: dict[str, Any] = {"state_dict": self.state_dict(), "hyper_parameters": dict(self.hparams)}
        self.on_save_checkpoint(checkpoint)
        return checkpoint

    def _task_spec(self) -> str | dict[str, Any]:
        """The task by name, or, if it is the user's own, whole: its file may be gone when the checkpoint is read."""
        given = self.hparams["task"]
        return given if given == self.task.name else self.task.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refill what was frozen, so that Lightning's own load stays strict.

        Raises:
            UserError: if the checkpoint belongs to another backbone or another method.
        """
        stored: Mapping[str, str] = checkpoint.get("backbone", {})
        if stored.get("fingerprint") != self.backbone.fingerprint:
            raise UserError(
                f"This checkpoint was trained on the backbone {stored.get('name')!r} (fingerprint"
                f" {stored.get('fingerprint')}), not on {self.backbone.name!r} ({self.backbone.fingerprint})."
            )
        state, own = checkpoint["state_dict"], self.state_dict()
        needed = {name for name, p in self.named_parameters() if p.requires_grad}
        wrong = sorted((set(state) - set(own)) | (needed - set(state)))
        if wrong:
            raise UserError(
                f"This checkpoint was not made by {type(self).__name__} with these settings: {len(wrong)} of the"
                f" weights do not match ({', '.join(wrong[:3])}…)."
            )
        checkpoint["state_dict"] = {**own, **state}
        self.total_steps = checkpoint.get("total_steps")


class FrozenBackbone(Method):
    """A way to fine-tune that leaves every pretrained weight as it is.

    Args:
        backbone_precision: What the frozen weights are held in. bf16, in which the backbone computes as well, takes
            half of their memory, and half of the time where the processor has it. int8 holds the blocks' linears in
            a quarter (torchao, weights only). What is trained is fp32.

    Raises:
        UserError: if int8 is asked for without torchao, or of a backbone that it cannot quantise.
    """

    @abstractmethod
    def __init__(self, backbone_precision: Precision = "fp32", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.freeze(backbone_precision)


class HiddenStateReader(FrozenBackbone):
    """A way to fine-tune that reads what the blocks of the frozen backbone put out.

    Args:
        activation_cache: Run the backbone once for each text, and keep what its blocks put out while training: in
            `memory`, or in files in this folder, which all runs share. A step on cached texts takes about a tenth
            of a forward pass. The memory that it needs is logged before anything is cached.
        cache_precision: What it is kept in: as it is, or in a half or a quarter of that.

    Raises:
        UserError: if there is no room for what is to be kept.
    """

    @abstractmethod
    def __init__(self, activation_cache: str | None = None, cache_precision: Precision = "fp32", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation_cache, self.cache_precision = activation_cache, cache_precision
        self.kept: Callable[[Batch], tuple[HiddenStates, ...]] | None = None

    def prepare(self, examples: Callable[[int], Iterable[Batch]]) -> None:
        """Begin a new training run; `examples` draws so many of the training examples, each in a batch of its own."""

    def taps(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """What every block of the backbone computed, per stream."""
        with torch.no_grad(), record_function("backbone"):
            return self.kept(batch) if self.kept else self.backbone.trunk(batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.trainer.ckpt_path:
            self.prepare(self._examples)
        if self.activation_cache is None:
            return
        folder = None if self.activation_cache == "memory" else Path(self.activation_cache)
        with self.trainer.precision_plugin.forward_context():  # which decides what the backbone computes, too
            self.kept = cache = ActivationCache(self.backbone, folder, self.cache_precision)
        texts = getattr(getattr(self.trainer, "datamodule", None), "texts", None)
        if texts is None:
            rank_zero_info(f"Cache in {cache.store}: how much it will take, these data do not tell.")
            return
        plan = cache.plan(texts(), self.trainer.num_devices)
        rank_zero_info(
            f"Cache in {cache.store}: {plan.texts:,} texts, {plan.new:,} of them new, for which"
            f" {plan.nbytes / 2**20:,.0f} MiB ({self.cache_precision}) will be kept."
        )

    def _examples(self, count: int) -> Iterator[Batch]:
        draw = getattr(getattr(self.trainer, "datamodule", None), "draw", None)
        if draw is None:
            raise UserError(
                "model.init=fisher draws examples from lit_spu's GLUE data: train on these, or use magnitude."
            )
        yield from map(self.trainer.strategy.batch_to_device, draw(count))

    def teardown(self, stage: str) -> None:
        self.kept = None
