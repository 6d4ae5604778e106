"""Ladder side-tuning (Sung, Cho, Bansal 2022, https://arxiv.org/abs/2206.06522).

A narrow side network reads the frozen backbone's hidden states through rungs with gates, and computes the logits.
Gradients pass through the side network alone, so no activation of the backbone is saved for the backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, HiddenStates
from lit_spu.errors import UserError
from lit_spu.methods.frozen import DrawExamples, HiddenStateReader
from lit_spu.nn import fusion as fusions
from lit_spu.nn import pruning
from lit_spu.nn.ladder import Ladder, Projection, SideNetwork
from lit_spu.ranges import Count, CountOrZero, Length, ShareBelowOne


class LadderBase(HiddenStateReader):
    """Base class of methods that train a ladder side network beside the frozen backbone.

    Args:
        reduction: The backbone's width divided by the side network's (r).
        drop_layers: Blocks without a side block, in every stack; 0 is the lowest.
        k: Radius of the windows: rung i reads the blocks i−k … i+k.
        fusion: Function that joins a window with the side state: LST's gate on the window's mean under learned weights;
            a plain sum; a gate computed for each example; attention of each token over its own 2k+1 hidden states; or
            attention over all tokens of these.
        hidden_state_dropout: Probability of dropping a whole hidden state of a window in training, drawn for each
            example.
        share_projections: One down-projection per block for all windows, instead of one per block and rung.
        init: Initial weights of the side network: random, or pruned from the backbone. Pruning keeps the most important
            1/r of each width, by the weights' magnitude or by their Fisher information about the task.
        prune_order: Coordinates of the backbone's residual stream that pruning keeps: the same everywhere (`residual`),
            or, as in the paper's code, ranked again by each layer for the next (`published`).
        fisher_examples: Number of training examples for the Fisher information.
        backbone_dropout: Leave the backbone's dropout on while training, as the paper's code does.
        gradient_checkpointing: Recompute the side network's blocks in the backward pass. It saves a fifth of the memory
            of short texts and half of that of long ones. On a CPU it costs a few per cent of a step, on a GPU more,
            because each operator has to be launched. By default it is on on a CPU, except with an activation_cache,
            where a step has little else to compute.

    Raises:
        UserError: If a number is out of range, or settings exclude each other.
    """

    @abstractmethod
    def __init__(
        self,
        reduction: Count = 8,
        drop_layers: Annotated[Sequence[CountOrZero], Length()] = (),
        k: CountOrZero = 0,
        fusion: Literal["gated", "additive", "dynamic", "attention", "cross_attention"] = "gated",
        hidden_state_dropout: ShareBelowOne = 0.0,
        share_projections: bool = True,
        init: Literal["random", "magnitude", "fisher"] = "random",
        prune_order: pruning.Order = "residual",
        fisher_examples: Count = 1024,
        backbone_dropout: bool = False,
        gradient_checkpointing: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if init != "random" and kwargs.get("backbone_precision", "fp32") != "fp32":
            raise UserError(f"model.init={init} prunes weights in fp32: leave out --model.backbone_precision.")
        if backbone_dropout and self.activation_cache:
            raise UserError(
                "model.backbone_dropout changes the hidden states in each step: leave out model.activation_cache."
            )
        depth = max(stack.depth for stack in self.backbone.stacks)
        if k >= depth:
            raise UserError(
                f"model.k={k}: the backbone has {depth} blocks. Use 0 to {depth - 1}, whose windows hold all blocks."
            )
        self.init, self.prune_order, self.fisher_examples = init, prune_order, fisher_examples
        self.backbone_dropout = backbone_dropout
        # the gate over a single block is LST's, without weights of a window
        fusion_name = "gate" if fusion == "gated" and not k else fusion
        fusion_class = getattr(fusions, fusion_name.title().replace("_", ""))
        make_ladder = partial(
            Ladder, fusion=fusion_class, radius=k, shared=share_projections, dropout=hidden_state_dropout
        )
        self.side = SideNetwork(self.backbone, reduction, drop_layers, make_ladder)
        if init == "magnitude":
            self._init_from_pruned(pruning.magnitude(self.backbone.base_model))
        if gradient_checkpointing or (gradient_checkpointing is None and not self.activation_cache):
            self.side.side_model.enable_gradient_checkpointing("cpu" if gradient_checkpointing is None else None)

    def prepare(self, examples: DrawExamples) -> None:
        super().prepare(examples)
        if self.init == "fisher":
            self.eval()
            self._init_from_pruned(pruning.fisher(self.backbone, examples(self.fisher_examples, 1)))
            self.train()

    def _init_from_pruned(self, importance: pruning.Importance) -> None:
        side, backbone = self.side.side_model, self.backbone.base_model
        pruning.init_from_pruned(side, backbone, self.side.layer_indices, importance, self.prune_order)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.backbone_dropout:
            self.backbone.base_model.model.train(mode)
        return self

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        ladders: list[Any] = list(self.side.ladders)
        for number, ladder in enumerate(ladders):
            prefix = f"stream {number}/" if len(ladders) > 1 else ""
            self.log_dict({f"{prefix}{name}": value for name, value in ladder.statistics().items()}, sync_dist=True)


class LadderSideTuning(LadderBase):
    """Train a side network that computes the state that the backbone's head reads."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side.up = Projection(self.side.side_model.output_width, self.backbone.width)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        with record_function("side"):
            inputs, position = self.backbone.model_inputs(batch), self.backbone.answer_position(batch)
            hidden = self.side(hidden_states, inputs, position)
            state = self.side.up(self.backbone.select_answer_state(hidden, batch))
        return self.backbone.apply_head(state)
