"""Linear read-outs of a frozen backbone: a forward pass, and a linear layer on the hidden states of some of its blocks.

Optionally the last blocks are tuned by LoRA. Then no gradient passes below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, FrozenStates, HiddenStates, Role, StateIndices
from lit_spu.errors import UserError
from lit_spu.methods.frozen import DrawExamples, HiddenStateReader
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.lora import LowRank
from lit_spu.nn.readout import Blocks, ReadOut, Tokens, select_blocks
from lit_spu.ranges import Count, CountOrZero, Positive, PositiveOrZero, ShareBelowOne
from lit_spu.tasks.metrics import task_metrics


class LinearReadOut(HiddenStateReader):
    """Train a linear layer on the hidden states of some blocks of the last stack, each normalised without parameters.

    Args:
        blocks: Blocks to read: the last, the upper half, all, or a list of numbers; 0 is the lowest.
        tokens: Tokens to read of each block: the answer's position, the mean over all tokens, or both.
        dropout: Share of the features that is dropped in training, if the linear layer is trained.
        fit_readout: Start at the logistic regression on all training examples, or in a regression task at the ridge
            regression. The default start is zero. The strength of the L2 penalty is chosen on a fifth of the examples.
        layers: Number of blocks at the end that are tuned by LoRA.
        rank: Rank of LoRA in these blocks.
        alpha: α, which scales LoRA's product by α/rank.
        readout_lr: Peak learning rate of the linear layer, null for `lr`. With 0 it stays as it was fitted.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(
        self,
        blocks: Blocks = "upper",
        tokens: Tokens = "both",
        dropout: ShareBelowOne = 0.5,
        fit_readout: bool = False,
        layers: CountOrZero = 0,
        rank: Count = 8,
        alpha: Positive = 16.0,
        readout_lr: PositiveOrZero | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)  # the backbone's own head is not used
        self.fit_readout, self.readout_lr = fit_readout, self.lr if readout_lr is None else readout_lr
        stack = self.backbone.stacks[-1]
        dropout = dropout if self.readout_lr else 0.0
        self.readout = ReadOut(select_blocks(blocks, stack.depth), stack.width, self.task.num_logits, tokens, dropout)
        tuned = self.backbone.last_blocks(layers, "model.layers", smallest=0)
        targets = self.backbone.target_linears(*get_args(Role), blocks=tuned) if tuned else ()
        self.pairs = adapter_dict(LowRank(target, rank, alpha).attach() for target in targets)
        self.num_frozen = len(self.backbone.blocks) - layers
        if layers and stack.depth not in self.read_indices()[-1]:
            raise UserError(
                f"model.layers={layers}: the read-out does not read the last block, so that tuned blocks would change"
                f" nothing. Add {stack.depth - 1} to model.blocks, or leave out model.layers."
            )

    def prepare(self, examples: DrawExamples) -> None:
        super().prepare(examples)
        if self.fit_readout:
            self._fit_readout(examples(None, 32))

    @torch.no_grad()
    def _fit_readout(self, batches: Iterable[Batch]) -> None:
        """Fit the linear layer to training examples; the other trained weights add nothing yet."""
        was_training = self.training
        self.eval()
        features, labels = [], []
        for batch in batches:
            states = self.compute_states(self.hidden_states(batch), batch)
            features.append(self.readout_features(states, batch))
            labels.append(batch["labels"])
        self.train(was_training)
        metric = task_metrics(self.task)[self.task.metrics[0]]

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return self.backbone.loss(logits, {"labels": labels})

        def score(logits: Tensor, labels: Tensor) -> float:
            value = metric.to(logits.device)(self.backbone.predict(logits)[0], labels)
            return float(value.nan_to_num(-torch.inf))

        all_features, all_labels = torch.cat(features), torch.cat(labels)
        features.clear()
        penalty = self.readout.fit(all_features, all_labels, loss, score)
        rank_zero_info(f"The read-out starts at its fit to {len(all_labels):,} examples, L2 penalty {penalty:g}.")

    def read_indices(self) -> StateIndices:
        """Return the hidden states that the method reads, of frozen and of tuned blocks."""
        return [*([()] * (len(self.backbone.stacks) - 1)), [block + 1 for block in self.readout.blocks]]

    def wanted_states(self) -> StateIndices:
        """Return the hidden states of the frozen blocks that the method and the tuned blocks read."""
        stacks = self.backbone.base_model
        needed = stacks.states_above(self.num_frozen if self.pairs else 0)
        counts = stacks.count_by_stack(self.num_frozen)
        return [
            {*below_tuned, *(index for index in read if index <= count and (index or not self.pairs))}
            for below_tuned, read, count in zip(needed, self.read_indices(), counts, strict=True)
        ]

    def compute_states(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Sequence[HiddenStates]:
        """Return the hidden states that the method reads, those of tuned blocks with gradients."""
        if not self.pairs:
            return hidden_states
        frozen = FrozenStates(self.num_frozen, hidden_states)
        with record_function("tuned blocks"):
            return self.backbone.hidden_states(batch, self.read_indices(), frozen)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        return self.apply_readout(self.compute_states(hidden_states, batch), batch)

    def readout_features(self, states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the features of the read-out, [batch, features]. The last block is read after the final norm."""
        read = states[-1]
        if len(read.blocks) - 1 in self.readout.blocks:
            last = self.backbone.base_model.apply_final_norm(read.blocks[-1])
            read = read._replace(blocks=(*read.blocks[:-1], last))
        return self.readout.features(read, self.backbone.answer_position(batch))

    def apply_readout(self, states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the logits [batch, labels] of the read-out."""
        with record_function("read-out"):
            logits: Tensor = self.readout(self.readout_features(states, batch))
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained weights, the read-out's with the learning rate `readout_lr`."""
        own = set(self.readout.parameters())
        groups = super().parameter_groups()
        return [
            {**group, "params": params, "lr": rate}
            for group in groups
            for is_own, rate in ((False, self.lr), (True, self.readout_lr))
            if (params := [p for p in group["params"] if (p in own) is is_own])
        ]
