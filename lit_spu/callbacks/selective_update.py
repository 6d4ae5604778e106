"""Selective updates: a policy decides which training steps run in full, and which parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_spu.backbones.stacks import tensor_of
from lit_spu.callbacks.policies import Policy
from lit_spu.errors import UserError
from lit_spu.nn.bypass import bypass_backward
from lit_spu.ranges import Checked, CountOrZero


class SelectiveUpdate(Checked, Callback):
    """Callback in which a policy chooses, step by step, between a full update and a smaller one.

    The callback sets `step_wrapper` of the method, which is then called instead of `step_loss`. A step has four parts:

    1. Before the forward pass the policy decides whether this is a full step. Any other step is skipped, or updates the
       biases alone (`otherwise`).
    2. Before the forward pass the policy may also name blocks that the backward pass bypasses.
    3. After the forward pass the policy may skip the backward pass.
    4. Before the optimizer step the policy receives the gradient norm.

    Parameters that are skipped have no gradient, so neither momentum nor weight decay changes them. Logged are
    `update/whole` (1 for a full step), `update/skipped` (the number of backward passes that were skipped so far), and
    `update/blocks` (the number of blocks that train; of an encoder-decoder only encoder blocks, because its decoder
    always trains). Compare each policy with `Random` at the same rate, and with plain training for the same number of
    backward passes.

    Args:
        policy: The policy with its settings: a class of `lit_spu.callbacks.policies`.
        otherwise: What to do in a step that is not full: skip it, or update the biases alone.
        depth: Number of the lowest block whose biases are updated; 0 is the lowest block of the backbone. The head's
            biases are always updated. Nothing below this block is stored for the backward pass.

    Raises:
        UserError: if `depth` is negative, or, before training, if the method has no automatic optimization, no
            `step_wrapper`, or no trainable blocks for a policy that chooses among blocks, or runs on several devices.
    """

    def __init__(self, policy: Policy, otherwise: Literal["skip", "biases"] = "skip", depth: CountOrZero = 0) -> None:
        self.policy, self.otherwise, self.depth = policy, otherwise, depth
        self.num_steps = self.num_skipped = 0
        self._batch: Any = None
        self._logits: Tensor | None = None
        self._not_biases: list[nn.Parameter] = []  # and the biases below `depth`
        self._until_train_end = ExitStack()  # removes the hooks on the module
        self._until_backward_end = ExitStack()  # restores the parameters and blocks that this step skips

    @property
    def summary(self) -> dict[str, float]:
        """Number of skipped backward passes, and number of steps."""
        return {"update/skipped": float(self.num_skipped), "update/steps": float(self.num_steps)}

    # -- before training --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse modules and trainers for which selective updates cannot work."""
        if stage != "fit":
            return
        self.num_steps = self.num_skipped = 0
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise UserError(
                f"SelectiveUpdate: {name} takes its steps by itself, so there is no backward pass of the Trainer to"
                " skip. Remove the callback."
            )
        if not hasattr(pl_module, "step_wrapper"):
            raise UserError(
                f"SelectiveUpdate: {name} has no attribute step_wrapper, through which a callback changes its training"
                " step. Use a subclass of lit_spu.methods.base.Method."
            )
        if trainer.world_size > 1:
            raise UserError(
                "SelectiveUpdate: several devices wait for each other's gradients. Use --trainer.devices 1."
            )
        self._check_blocks(pl_module)
        self.policy.setup(pl_module, getattr(trainer, "datamodule", None), trainer.strategy.root_device)

    def _check_blocks(self, pl_module: Any) -> None:
        """Refuse a module whose blocks the settings do not fit."""
        blocks = getattr(pl_module, "parameters_by_depth", [])[1:]
        chooses_blocks = self.otherwise == "biases" or self.policy.bypassed_blocks(step=0, num_blocks=1000)
        if chooses_blocks and not any(p.requires_grad for block in blocks for p in block):
            raise UserError(
                f"SelectiveUpdate: {type(pl_module).__name__} trains nothing in the backbone's blocks, so no part of"
                " them can be skipped. Choose a policy that skips steps, with otherwise=skip."
            )
        if self.otherwise == "biases" and self.depth >= len(blocks):
            raise UserError(
                f"SelectiveUpdate: depth={self.depth} is too large: the backbone has {len(blocks)} blocks, 0 is the"
                " lowest."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def save_logits(module: nn.Module, args: Any, output: Any) -> None:
            self._logits = tensor_of(output)

        below = {id(p) for layer in pl_module.parameters_by_depth[: self.depth + 1] for p in layer}
        self._not_biases = [
            p for name, p in pl_module.named_parameters() if id(p) in below or not name.endswith("bias")
        ]
        pl_module.step_wrapper = partial(self._run_step, trainer, pl_module)
        self._until_train_end.callback(setattr, pl_module, "step_wrapper", None)
        self._until_train_end.callback(pl_module.register_forward_hook(save_logits).remove)

    # -- a step -----------------------------------------------------------------------------------------------------

    def _run_step(
        self, trainer: Trainer, pl_module: Any, step_loss: Callable[..., Tensor | None], batch: Any
    ) -> Tensor | None:
        """Return the loss of a training step, or None to skip its backward pass."""
        step = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self._batch = batch
        self.num_steps += 1
        is_full = self.policy.before_forward(step, batch)
        loss = None
        if is_full or self.otherwise == "biases":
            self._limit_update(pl_module, step, is_full)
            loss = step_loss(batch)
            if not self._needs_backward(loss, batch):
                is_full, loss = False, None
        if loss is None:
            self.num_skipped += 1
            self._until_backward_end.close()
        pl_module.log_step("update/whole", is_full)
        pl_module.log_step("update/skipped", self.num_skipped)
        return loss

    def _limit_update(self, pl_module: Any, step: int, is_full: bool) -> None:
        """Bypass the policy's blocks, and unless the step is full freeze all but biases, for one backward pass."""
        # In an encoder-decoder the encoder's blocks: a bypassed decoder block would pass no gradient to the encoder.
        blocks = pl_module.backbone.stacks[0].blocks
        bypassed_blocks = self.policy.bypassed_blocks(step, len(blocks))
        for number in bypassed_blocks:
            self._until_backward_end.enter_context(bypass_backward(blocks[number]))
        if not is_full:
            self._until_backward_end.enter_context(self._only_biases_trainable())
        if bypassed_blocks:
            pl_module.log_step("update/blocks", len(blocks) - len(bypassed_blocks))

    def _needs_backward(self, loss: Tensor | None, batch: Any) -> bool:
        """Return whether to run the backward pass: the policy decides, and something must train in it."""
        logits, self._logits = self._logits, None
        if logits is not None and not self.policy.after_forward(logits.detach(), batch):
            return False
        return loss is None or loss.requires_grad  # None if the method skipped the backward pass by itself

    @contextmanager
    def _only_biases_trainable(self) -> Iterator[None]:
        """Freeze all parameters but the biases of the head and of the blocks from `depth` up."""
        frozen = [parameter for parameter in self._not_biases if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not right after the forward pass, because gradient checkpointing repeats it during the backward pass
        self._until_backward_end.close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if type(self.policy).after_step is Policy.after_step:
            return  # computing the norm takes time, and this policy does not use it
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            self.policy.after_step(float(get_total_norm(gradients)), self._batch)

    # -- after training ---------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._until_train_end.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._until_backward_end.close()
        self._until_train_end.close()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.num_steps, "skipped": self.num_skipped, "policy": self.policy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_steps, self.num_skipped = state_dict["steps"], state_dict["skipped"]
        self.policy.load_state_dict(state_dict["policy"])
