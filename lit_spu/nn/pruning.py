"""A side network that starts as its backbone, pruned (LST, section 3.2; https://arxiv.org/abs/2206.06522).

Of each of the backbone's widths the side network keeps 1/r, the most important by the weights' magnitude, or by their
Fisher information about the task. Everything is ranked once and the least important removed, ties by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_spu.backbones.base import Backbone, Batch, TargetLinear, TransformerStacks, norms_of
from lit_spu.errors import UserError

Scores = Mapping[str, Tensor]
"""How important each weight is, not negative, by the parameter's name in the base model."""
Order = Literal["residual", "published"]


def magnitude(trunk: TransformerStacks) -> Scores:
    """The absolute values of the weights."""
    return {name: p.detach().float().abs() for name, p in trunk.model.named_parameters()}


def fisher(backbone: Backbone, examples: Iterable[Batch]) -> Scores:
    """The empirical Fisher information: the squared gradients of the task's loss, summed over single examples."""
    learnt = [p.requires_grad for p in backbone.parameters()]
    backbone.requires_grad_(True)
    parameters = dict(backbone.base_model.model.named_parameters())
    scores = {name: torch.zeros_like(p) for name, p in parameters.items()}
    try:
        for example in examples:
            loss = backbone.loss(backbone(example), example)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for score, gradient in zip(scores.values(), found, strict=True):
                if gradient is not None:
                    score += gradient**2
    finally:
        for parameter, learns in zip(backbone.parameters(), learnt, strict=True):
            parameter.requires_grad_(learns)
    return scores


@torch.no_grad()
def init_from_pruned(
    side: TransformerStacks,
    backbone: TransformerStacks,
    kept: Sequence[Sequence[int]],
    scores: Scores,
    order: Order = "residual",
) -> Tensor:
    """Start every weight of `side` from the backbone's, whose blocks `kept` (of each stream) it has narrower.

    Args:
        side: Made by `TransformerStacks.shrunk`, or the trunk of a `Backbone.student`.
        backbone: What it was made from.
        kept: For each stream, the backbone's block of each of its blocks.
        scores: The importance of the backbone's weights.
        order: `residual` keeps the same coordinates of the residual stream everywhere, and as many of each head's own.
            `published` is the order of the paper's code: from the embeddings up, the rows of what writes into the
            residual stream are ranked anew for whatever reads it next, and a head's coordinates are those of any head.

    Returns:
        The coordinates of the residual stream that are kept, in `published` order those of the embeddings.

    Raises:
        UserError: if the family has weights that cannot be told apart.
    """
    return _Pruning(side, backbone, scores, order)(kept)


def top(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` greatest, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


class _Pruning:
    """One start, from the embeddings up."""

    def __init__(self, side: TransformerStacks, backbone: TransformerStacks, scores: Scores, order: Order) -> None:
        self.side, self.backbone, self.scores, self.order = side, backbone, scores, order
        self.narrow = side.model.config.hidden_size
        self.pre_norm = bool(backbone.family.after)  # a norm behind the last block means one in front of each part
        self.inner = {target.role: len(target.weight) for target in side.block_target_linears(0, 0, "query", "up")}

    def __call__(self, kept: Sequence[Sequence[int]]) -> Tensor:
        first = current = self._residual()
        ends = []
        for stream, blocks in enumerate(self.backbone.stacks):
            for number in range(len(blocks)):
                place = kept[stream].index(number) if number in kept[stream] else None
                current = self._block(stream, number, place, current)
            ends.append(current)
        self._outside(first, ends)
        return first

    def _score(self, target: TargetLinear) -> Tensor:
        return target.part(self.scores[f"{target.path}.weight"]).double()

    def _residual(self) -> Tensor:
        """The coordinates of the residual stream that matter: by what writes into it, or by the embeddings alone."""
        written = self._columns(self.backbone.model.config.hidden_size)
        if self.order == "residual" or not written:
            written += [self._score(target).sum(1) for target in self.backbone.target_linears("output", "down")]
        return top(torch.stack(written).sum(0), self.narrow)

    def _columns(self, width: int) -> list[Tensor]:
        """The scores of the columns of each table of embeddings that is so wide."""
        embedded = _parameters(self.backbone.embeddings)
        return [
            self.scores[name].double().sum(0)
            for name, p in self.backbone.model.named_parameters()
            if p in embedded and p.ndim == 2 and p.shape[1] == width
        ]

    def _block(self, stream: int, number: int, place: int | None, current: Tensor) -> Tensor:
        """Start the side block at that place, if it has one; gives the coordinates that the next block reads."""
        linears: list[tuple[TargetLinear, Tensor, Tensor]] = []  # with the rows and the columns that are kept
        seen = []  # by each norm
        attention = (
            self.backbone.block_target_linears(stream, number, role) for role in ("query", "key", "value", "output")
        )
        for query, key, value, output in zip(*attention, strict=True):
            queries, keys = self._heads(query, key, value, current)
            written = self._written(output, queries, current)
            seen.append(current if self.pre_norm else written)
            linears += [(query, queries, current), (key, keys, current), (value, keys, current)]
            linears += [(output, written, queries)]
            current = written
        ups, (down,) = (self.backbone.block_target_linears(stream, number, role) for role in ("up", "down"))
        inner = top(torch.stack([self._score(up)[:, current].sum(1) for up in ups]).sum(0), self.inner["up"])
        written = self._written(down, inner, current)
        seen.append(current if self.pre_norm else written)
        linears += [*((up, inner, current) for up in ups), (down, written, inner)]
        if place is not None:
            self._start(stream, number, place, linears, seen)
        return written

    def _heads(
        self, query: TargetLinear, key: TargetLinear, value: TargetLinear, current: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows of the queries, and those of keys and values, by the product of all three summed over columns."""
        # in logarithms: products of three Fisher scores would be too small for any format
        of_query, of_key, of_value = (self._score(target)[:, current].log() for target in (query, key, value))
        count = self.inner["query"]
        if self.order == "published":
            if of_query.shape != of_key.shape:
                raise UserError(
                    "model.prune_order=published wants as many heads of keys as of queries: use"
                    " --model.prune_order=residual."
                )
            rows = top((of_query + of_key + of_value).logsumexp(1), count)
            return rows, rows
        heads = self.backbone.streams[0].heads
        width = len(of_query) // heads
        groups, columns = len(of_key) // width, len(current)  # heads of keys, which as many queries share
        product = of_query.view(groups, -1, width, columns) + (of_key + of_value).view(groups, 1, width, columns)
        joint = product.logsumexp((1, 3))  # [groups, width]
        pairs = self.backbone.family.shape.pairs  # of coordinates that are turned together: i and i + width/2
        joint = joint.view(groups, pairs, -1).logsumexp(1)
        kept = torch.stack([top(scores, count // heads // pairs) for scores in joint])
        kept = torch.cat([kept + turn * width // pairs for turn in range(pairs)], 1)
        starts = width * torch.arange(heads, device=kept.device).unsqueeze(1)
        return (starts + kept.repeat_interleave(heads // groups, 0)).flatten(), (starts[:groups] + kept).flatten()

    def _written(self, target: TargetLinear, columns: Tensor, current: Tensor) -> Tensor:
        if self.order == "residual":
            return current
        return top(self._score(target)[:, columns].sum(1), self.narrow)

    def _start(
        self,
        stream: int,
        number: int,
        place: int,
        linears: Iterable[tuple[TargetLinear, Tensor, Tensor]],
        seen: Sequence[Tensor],
    ) -> None:
        roles, side = self.backbone.family.target_linears, self.side.stacks[stream][place]
        both = zip(
            self.backbone.block_target_linears(stream, number, *roles),
            self.side.block_target_linears(stream, place, *roles),
            strict=True,
        )
        ours = {str(theirs): own for theirs, own in both}
        for theirs, rows, columns in linears:
            own = ours[str(theirs)]
            own.weight.copy_(theirs.weight[rows][:, columns])
            if own.bias is not None and theirs.bias is not None:
                own.bias.copy_(theirs.bias[rows])
        of_norms = {p: kept for norm, kept in zip(norms_of(side), seen, strict=False) for p in norm.parameters()}
        done = _parameters(own.linear for own in ours.values())
        # what only the first block has, all share: a T5's biases by position
        blocks = self.backbone.stacks[stream]
        shared = dict(blocks[0].named_parameters())
        given = shared | dict(blocks[number].named_parameters())
        for name, parameter in side.named_parameters():
            if parameter not in done:
                self._copy(name, parameter, given[name], of_norms.get(parameter, seen[0]))

    def _outside(self, first: Tensor, ends: Sequence[Tensor]) -> None:
        """Start what lies in front of the blocks, and behind those of each stream."""
        inside, embedded = _parameters(self.side.blocks), _parameters(self.side.embeddings)
        above = [path.rpartition(".")[0] for path in self.side.family.stacks]
        for name, parameter in self.side.model.named_parameters():
            if parameter not in inside:
                stream = next((i for i, path in enumerate(above) if name.startswith(path)), len(above) - 1)
                kept = first if parameter in embedded else ends[stream]
                self._copy(name, parameter, self.backbone.model.get_parameter(name), kept)

    def _copy(self, name: str, own: Tensor, theirs: Tensor, kept: Tensor) -> None:
        """Copy what lies along the residual stream, or has the same size in both."""
        for axis, (was, now) in enumerate(zip(theirs.shape, own.shape, strict=True)):
            if was == self.backbone.model.config.hidden_size != now:
                theirs = theirs.index_select(axis, kept)
            elif was != now:
                theirs = theirs.index_select(axis, self._other(was, now, name))
        own.copy_(theirs)

    def _other(self, was: int, now: int, name: str) -> Tensor:
        """What is kept of embeddings that are narrower than the blocks."""
        columns = self._columns(was)
        if not columns:
            raise UserError(
                f"model.init: how {name} of a {self.backbone.model.config.model_type} narrows from {was} to {now} is"
                " not known. Use --model.init=random."
            )
        return top(torch.stack(columns).sum(0), now)


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {p for module in modules for p in module.parameters()}
