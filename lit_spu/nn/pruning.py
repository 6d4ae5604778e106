"""Initialisation of a side network by pruning the backbone (LST, section 3.2; https://arxiv.org/abs/2206.06522).

The side network keeps the most important 1/r of each of the backbone's widths, by the magnitude of the weights or by
their Fisher information about the task. Of equally important coordinates, the first is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.side_model import LayerIndices
from lit_spu.backbones.stacks import Batch, TransformerStacks, find_norms
from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.errors import UserError

Importance = Mapping[str, Tensor]
"""The importance of each weight, at least 0, by the parameter's name in the base model."""

Order = Literal["residual", "published"]


def magnitude(base_model: TransformerStacks) -> Importance:
    """Return the absolute values of the weights."""
    return {name: p.detach().float().abs() for name, p in base_model.model.named_parameters()}


def fisher(backbone: Backbone, examples: Iterable[Batch]) -> Importance:
    """Return the empirical Fisher information: squared gradients of the loss, summed over batches of one example."""
    was_trainable = [p.requires_grad for p in backbone.parameters()]
    backbone.requires_grad_(True)
    parameters = dict(backbone.base_model.model.named_parameters())
    importance = {name: torch.zeros_like(p) for name, p in parameters.items()}
    try:
        for example in examples:
            loss = backbone.loss(backbone(example), example)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, grad in zip(importance.values(), grads, strict=True):
                if grad is not None:
                    total += grad**2
    finally:
        for parameter, trainable in zip(backbone.parameters(), was_trainable, strict=True):
            parameter.requires_grad_(trainable)
    return importance


@torch.no_grad()
def init_from_pruned(
    side: TransformerStacks,
    backbone: TransformerStacks,
    layer_indices: LayerIndices,
    importance: Importance,
    order: Order = "residual",
) -> Tensor:
    """Initialise all weights of a side model with the backbone's.

    Args:
        side: A model of `make_side_model`, or the base model of a `Backbone.make_student`.
        backbone: The model that it was made from.
        layer_indices: For each stack, the backbone's block for each block of the side model.
        importance: The importance of the backbone's weights.
        order: `residual` keeps the same coordinates of the residual stream everywhere, and the same number of
            coordinates in each attention head. `published` is the order of the paper's code: from the embeddings up,
            each layer that writes into the residual stream ranks its rows for the next layer that reads it. The
            coordinates of queries and keys are ranked over all heads together.

    Returns:
        The kept coordinates of the residual stream; in `published` order, those at the embeddings.

    Raises:
        UserError: If the family has weights whose coordinates are unknown.
    """
    return _Pruning(side, backbone, importance, order)(layer_indices)


def top_indices(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` greatest values in ascending order; of equal values the first."""
    return values.argsort(descending=True, stable=True)[:count].sort().values


class _PrunedLinear(NamedTuple):
    """A linear layer of the backbone with the rows (outputs) and columns (inputs) that are kept."""

    target: TargetLinear
    rows: Tensor
    columns: Tensor


class _Pruning:
    """Initialisation of one side model, block by block from the embeddings up.

    In its methods, `current` holds the kept coordinates of the residual stream at the present layer.
    """

    def __init__(
        self, side: TransformerStacks, backbone: TransformerStacks, importance: Importance, order: Order
    ) -> None:
        self.side, self.backbone, self.importance, self.order = side, backbone, importance, order
        self.side_width = side.model.config.hidden_size
        self.is_pre_norm = bool(backbone.family.final_modules)  # a final norm implies a norm before each sublayer
        self.inner_width = {t.role: len(t.weight) for t in side.block_target_linears(0, 0, "query", "up")}

    def __call__(self, layer_indices: LayerIndices) -> Tensor:
        first = current = self._select_residual()
        ends = []
        for stack, (blocks, indices) in enumerate(zip(self.backbone.stacks, layer_indices, strict=True)):
            for block in range(blocks.depth):
                side_block = indices.index(block) if block in indices else None
                current = self._prune_block(stack, block, side_block, current)
            ends.append(current)
        self._copy_outside_blocks(first, ends)
        return first

    def _importance_of(self, target: TargetLinear) -> Tensor:
        return target.select_rows(self.importance[f"{target.path}.weight"]).double()

    def _select_residual(self) -> Tensor:
        """Return the coordinates of the residual stream to keep at the embeddings, and in `residual` order everywhere.

        They are ranked by all layers that write into the residual stream; in `published` order by the embeddings alone.
        """
        writers = self._embedding_columns(self.backbone.model.config.hidden_size)
        if self.order == "residual" or not writers:
            writers += [self._importance_of(t).sum(1) for t in self.backbone.target_linears("output", "down")]
        return top_indices(torch.stack(writers).sum(0), self.side_width)

    def _embedding_columns(self, width: int) -> list[Tensor]:
        """Return the importance of the columns of each embedding table of this width."""
        embeddings = _parameters(self.backbone.embeddings)
        return [
            self.importance[name].double().sum(0)
            for name, p in self.backbone.model.named_parameters()
            if p in embeddings and p.ndim == 2 and p.shape[1] == width
        ]

    def _prune_block(self, stack: int, block: int, side_block: int | None, current: Tensor) -> Tensor:
        """Initialise the side block, if there is one, and return the coordinates after this block."""
        linears: list[_PrunedLinear] = []
        norm_coordinates = []
        roles = (self.backbone.block_target_linears(stack, block, r) for r in ("query", "key", "value", "output"))
        for query, key, value, output in zip(*roles, strict=True):
            query_rows, key_rows = self._select_head_rows(query, key, value, current)
            written = self._select_written(output, query_rows, current)
            norm_coordinates.append(current if self.is_pre_norm else written)
            linears += [
                _PrunedLinear(query, query_rows, current),
                _PrunedLinear(key, key_rows, current),
                _PrunedLinear(value, key_rows, current),
                _PrunedLinear(output, written, query_rows),
            ]
            current = written
        ups, (down,) = (self.backbone.block_target_linears(stack, block, role) for role in ("up", "down"))
        widened = torch.stack([self._importance_of(up)[:, current].sum(1) for up in ups]).sum(0)
        inner = top_indices(widened, self.inner_width["up"])
        written = self._select_written(down, inner, current)
        norm_coordinates.append(current if self.is_pre_norm else written)
        linears += [*(_PrunedLinear(up, inner, current) for up in ups), _PrunedLinear(down, written, inner)]
        if side_block is not None:
            self._init_block(stack, block, side_block, linears, norm_coordinates)
        return written

    def _select_head_rows(
        self, query: TargetLinear, key: TargetLinear, value: TargetLinear, current: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of the queries to keep, and the rows of keys and values to keep.

        They are ranked by the product of the importance of all three, summed over the columns.
        """
        # logarithms, because products of three Fisher values underflow
        log_query, log_key, log_value = (self._importance_of(t)[:, current].log() for t in (query, key, value))
        count = self.inner_width["query"]
        if self.order == "published":
            if log_query.shape != log_key.shape:
                raise UserError(
                    "model.prune_order=published needs as many heads of keys as of queries: use"
                    " --model.prune_order=residual."
                )
            rows = top_indices((log_query + log_key + log_value).logsumexp(1), count)
            return rows, rows
        num_heads = self.backbone.stacks[0].num_heads
        head_dim = len(log_query) // num_heads
        groups, columns = len(log_key) // head_dim, len(current)  # each head of keys serves a group of query heads
        grouped_query = log_query.view(groups, -1, head_dim, columns)
        joint = (grouped_query + (log_key + log_value).view(groups, 1, head_dim, columns)).logsumexp((1, 3))
        # rotary embeddings rotate coordinates i and i + head_dim/2 together, so both are kept or neither
        halves = self.backbone.family.architecture.head_dim_multiple
        joint = joint.view(groups, halves, -1).logsumexp(1)
        rows = torch.stack([top_indices(values, count // num_heads // halves) for values in joint])
        rows = torch.cat([rows + half * head_dim // halves for half in range(halves)], 1)
        starts = head_dim * torch.arange(num_heads, device=rows.device).unsqueeze(1)
        query_rows = starts + rows.repeat_interleave(num_heads // groups, 0)
        return query_rows.flatten(), (starts[:groups] + rows).flatten()

    def _select_written(self, target: TargetLinear, columns: Tensor, current: Tensor) -> Tensor:
        """Return the kept coordinates of the residual stream after a layer that writes into it."""
        if self.order == "residual":
            return current
        return top_indices(self._importance_of(target)[:, columns].sum(1), self.side_width)

    def _init_block(
        self,
        stack: int,
        block: int,
        side_block: int,
        linears: Sequence[_PrunedLinear],
        norm_coordinates: Sequence[Tensor],
    ) -> None:
        roles, side = self.backbone.family.target_linears, self.side.stacks[stack].blocks[side_block]
        twins = zip(
            self.backbone.block_target_linears(stack, block, *roles),
            self.side.block_target_linears(stack, side_block, *roles),
            strict=True,
        )
        side_linear = {str(target): own for target, own in twins}
        for target, rows, columns in linears:
            own = side_linear[str(target)]
            own.weight.copy_(target.weight[rows][:, columns])
            if own.bias is not None and target.bias is not None:
                own.bias.copy_(target.bias[rows])
        norms = zip(find_norms(side), norm_coordinates, strict=False)
        coordinates = {p: indices for norm, indices in norms for p in norm.parameters()}
        done = _parameters(own.linear for own in side_linear.values())
        # weights that only the first block has serve all blocks, such as a T5's relative position biases
        blocks = self.backbone.stacks[stack].blocks
        source = dict(blocks[0].named_parameters()) | dict(blocks[block].named_parameters())
        for name, parameter in side.named_parameters():
            if parameter not in done:
                self._copy(name, parameter, source[name], coordinates.get(parameter, norm_coordinates[0]))

    def _copy_outside_blocks(self, first: Tensor, ends: Sequence[Tensor]) -> None:
        """Initialise the modules before the blocks, and those after the blocks of each stack."""
        in_blocks, in_embeddings = _parameters(self.side.blocks), _parameters(self.side.embeddings)
        parents = [path.rpartition(".")[0] for path in self.side.family.stacks]
        for name, parameter in self.side.model.named_parameters():
            if parameter not in in_blocks:
                stack = next((i for i, path in enumerate(parents) if name.startswith(path)), len(parents) - 1)
                coordinates = first if parameter in in_embeddings else ends[stack]
                self._copy(name, parameter, self.backbone.model.get_parameter(name), coordinates)

    def _copy(self, name: str, parameter: Tensor, source: Tensor, coordinates: Tensor) -> None:
        """Copy a weight. Axes of the residual stream's width are reduced to these coordinates."""
        for axis, (old, new) in enumerate(zip(source.shape, parameter.shape, strict=True)):
            if old == self.backbone.model.config.hidden_size != new:
                source = source.index_select(axis, coordinates)
            elif old != new:
                source = source.index_select(axis, self._select_narrow_embedding(old, new, name))
        parameter.copy_(source)

    def _select_narrow_embedding(self, old: int, new: int, name: str) -> Tensor:
        """Return the coordinates to keep of embeddings that are narrower than the blocks."""
        columns = self._embedding_columns(old)
        if not columns:
            raise UserError(
                f"model.init: {name} of a {self.backbone.model.config.model_type} would shrink from {old} to {new}, and"
                " its coordinates are unknown. Use --model.init=random."
            )
        return top_indices(torch.stack(columns).sum(0), new)


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {p for module in modules for p in module.parameters()}
