"""Not every step is worth its backward pass: a policy decides which, or how much of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_spu.callbacks.policies import Policy
from lit_spu.errors import UserError
from lit_spu.nn.bypass import bypass_backward


class SelectiveUpdate(Callback):
    """Lets a policy choose, step by step, between the whole update and less of it.

    What is left out has no gradient, so that neither momentum nor weight decay moves it. `update/whole` is 1 where a
    step is, `update/skipped` counts the backward passes that were not run, `update/blocks` is how many blocks learn (of
    an encoder-decoder, the encoder's: the decoder always does).
    Compare each policy with `Random` at its rate, and with plain training for as many backward passes.

    Args:
        policy: Who chooses, with its settings: a class of `lit_spu.callbacks.policies`.
        otherwise: What a step is that is not whole: nothing, or an update of the biases alone.
        depth: The biases are those of the blocks from this one up (0 is the lowest) and of the head: below, nothing is
            stored for the backward pass.

    Raises:
        UserError: before training, if the method does not learn by a Trainer's backward passes, has no blocks that a
            policy could go around, or runs on several devices.
    """

    def __init__(self, policy: Policy, otherwise: Literal["skip", "biases"] = "skip", depth: int = 0) -> None:
        if depth < 0:
            raise UserError(f"SelectiveUpdate: depth={depth} must be at least 0.")
        self.policy, self.otherwise, self.depth = policy, otherwise, depth
        self.steps = self.skipped = 0
        self._scores: Tensor | None = None
        self._batch: Any = None
        self._open = ExitStack()
        self._partial = ExitStack()  # what this step leaves out

    @property
    def summary(self) -> dict[str, float]:
        """How many backward passes were not run, and of how many steps."""
        return {"update/skipped": float(self.skipped), "update/steps": float(self.steps)}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be."""
        if stage != "fit":
            return
        self.steps = self.skipped = 0
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise UserError(
                f"SelectiveUpdate: {name} takes its steps by itself, and has no backward pass to leave out."
            )
        if trainer.world_size > 1:
            raise UserError(
                "SelectiveUpdate: several devices wait for each other's gradients. Use --trainer.devices 1."
            )
        blocks = getattr(pl_module, "parameters_by_depth", [])[1:]
        in_blocks = self.otherwise == "biases" or self.policy.passes(0, 1000)
        if in_blocks and not any(p.requires_grad for block in blocks for p in block):
            raise UserError(
                f"SelectiveUpdate: {name} trains nothing in the backbone's blocks, of which some could be left out."
                " Choose a policy that leaves out steps, with otherwise=skip."
            )
        if self.otherwise == "biases" and self.depth >= len(blocks):
            raise UserError(
                f"SelectiveUpdate: depth={self.depth}: the backbone has {len(blocks)} blocks, 0 the lowest."
            )
        self.policy.begin(pl_module, getattr(trainer, "datamodule", None), trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.step_wrapper = partial(self._step, trainer, module)
        self._open.callback(delattr, module, "step_wrapper")

        def keep(_: nn.Module, __: Any, scores: Any) -> None:
            self._scores = scores

        self._open.callback(pl_module.register_forward_hook(keep).remove)

    def _step(self, trainer: Trainer, pl_module: Any, plain: Callable[..., Any], batch: Any) -> Tensor | None:
        """A training step, or what is left of it."""
        number, self._batch = trainer.fit_loop.epoch_loop.batch_progress.total.completed, batch
        self.steps += 1
        whole = self.policy.chooses(number, batch)
        loss: Tensor | None = None
        if whole or self.otherwise == "biases":
            blocks = pl_module.backbone.stacks[0].blocks  # a decoder's lead the gradient to the encoder
            around = self.policy.passes(number, len(blocks))
            for passed in around:
                self._partial.enter_context(bypass_backward(blocks[passed]))
            if not whole:
                self._partial.enter_context(self._biases_alone(pl_module))
            loss = plain(batch)
            if around:
                pl_module.log("update/blocks", float(len(blocks) - len(around)))
            scores, self._scores = self._scores, None
            agrees = scores is None or self.policy.agrees(scores.detach(), batch)
            if not agrees or (loss is not None and not loss.requires_grad):  # all that learns was gone around
                whole, loss = False, None
        pl_module.log("update/whole", float(whole))
        if loss is None:
            self.skipped += 1
            self._partial.close()
        pl_module.log("update/skipped", float(self.skipped))
        return loss

    @contextmanager
    def _biases_alone(self, pl_module: Any) -> Iterator[None]:
        """Only the head's biases, and those of the blocks from `depth` up, are part of the graph."""
        below = {id(p) for stage in pl_module.parameters_by_depth[: self.depth + 1] for p in stage}
        others = [
            p
            for name, p in pl_module.named_parameters()
            if p.requires_grad and (id(p) in below or not name.endswith("bias"))
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._partial.close()  # not before: what is recomputed is to be what was computed

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if type(self.policy).learnt is Policy.learnt:
            return
        if gradients := [p.grad for p in pl_module.parameters() if p.grad is not None]:
            self.policy.learnt(float(get_total_norm(gradients)), self._batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._partial.close()
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "skipped": self.skipped, "policy": self.policy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.skipped = state_dict["steps"], state_dict["skipped"]
        self.policy.load_state_dict(state_dict["policy"])
