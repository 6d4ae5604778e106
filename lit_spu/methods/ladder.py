"""Ladder side-tuning (Sung, Cho, Bansal 2022, https://arxiv.org/abs/2206.06522).

A narrow side network reads the frozen backbone's blocks through gated rungs and answers in its place. Gradients flow
through the side network alone, so nothing of the backbone is stored for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch
from lit_spu.errors import UserError
from lit_spu.methods.base import HiddenStateReader
from lit_spu.nn import pruning
from lit_spu.nn.ladder import SideNetwork


class LadderSideTuning(HiddenStateReader):
    """Train a side network beside the frozen backbone.

    Args:
        reduction: The backbone's width over the side network's (r).
        drop_layers: Blocks beside which the side network has none, in every stack; 0 is the lowest.
        init: The side network's weights: random, or the backbone's, of which the most important 1/r of each width is
            kept, by magnitude or by their Fisher information about the task.
        prune_order: What is kept of the backbone's residual stream: the same coordinates everywhere, or, as in the
            paper's code, ranked anew by each part of a block for the next.
        fisher_examples: Training examples whose gradients make the Fisher information.
        backbone_dropout: Leave the backbone's dropout on while training, as the paper's code does.
        gradient_checkpointing: Recompute the side network's feed-forwards, and the attention maps of short texts, in
            the backward pass. Off, a step takes up to a quarter more memory. By default it is on where a step runs the
            backbone, of which that is a per cent or two, and off with a activation_cache, where it would be an eighth.

    Raises:
        UserError: if a number is out of range, or the settings exclude each other.
    """

    def __init__(
        self,
        reduction: int = 8,
        drop_layers: Sequence[int] = (),
        init: Literal["random", "magnitude", "fisher"] = "random",
        prune_order: pruning.Order = "residual",
        fisher_examples: int = 1024,
        backbone_dropout: bool = False,
        gradient_checkpointing: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if init != "random" and kwargs.get("backbone_precision", "fp32") != "fp32":
            raise UserError(f"model.init={init} prunes weights in fp32: leave out --model.backbone_precision.")
        if backbone_dropout and self.activation_cache:
            raise UserError(
                "model.backbone_dropout makes the backbone answer anew each time: leave out activation_cache."
            )
        self.init, self.prune_order, self.fisher_examples = init, prune_order, fisher_examples
        self.backbone_dropout = backbone_dropout
        self.side = SideNetwork(self.backbone, reduction, drop_layers)
        if init == "magnitude":
            self._prune(pruning.magnitude(self.backbone.base_model))
        if gradient_checkpointing is None:
            gradient_checkpointing = not self.activation_cache
        if gradient_checkpointing:
            self.side.trunk.recompute_feed_forwards()
        else:
            self.side.trunk.keep_maps()

    def prepare(self, examples: Callable[[int], Iterable[Batch]]) -> None:
        if self.init == "fisher":
            self.eval()
            self._prune(pruning.fisher(self.backbone, examples(self.fisher_examples)))
            self.train()

    def _prune(self, scores: pruning.Scores) -> None:
        pruning.init_from_pruned(self.side.trunk, self.backbone.base_model, self.side.kept, scores, self.prune_order)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.backbone_dropout:
            self.backbone.base_model.model.train(mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        taps = self.taps(batch)
        with record_function("side"):
            hidden = self.side(taps, self.backbone.inputs(batch), self.backbone.position(batch))
            state = self.side.up(self.backbone.read(hidden, batch))
        return self.backbone.head(state)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        ladders: list[Any] = list(self.side.ladders)
        for stream, ladder in enumerate(ladders):
            of = f"stream {stream}/" if len(ladders) > 1 else ""
            self.log_dict({f"{of}{name}": value for name, value in ladder.statistics().items()}, sync_dist=True)
