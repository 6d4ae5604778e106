"""The stacks of transformer blocks of a Hugging Face base model, and the hidden states that they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_spu.backbones import absorbed_cross_attention, last_position
from lit_spu.backbones.family import Family
from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.backbones.last_position import gather_position
from lit_spu.backbones.target_linears import Role, TargetLinear, parse_pattern
from lit_spu.errors import UserError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack of blocks. An encoder-decoder has two."""

    blocks: tuple[nn.Module, ...]
    width: int
    num_heads: int
    is_causal: bool

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


class HiddenStates(NamedTuple):
    """Hidden states of one stack: its first block's input and the outputs of its blocks, [batch, tokens, width]."""

    embeddings: Tensor
    blocks: tuple[Tensor, ...]
    mask: Tensor | None  # [batch, tokens], 1 where a token is real; None if all are


class TransformerStacks:
    """Access to the stacks of a Hugging Face base model. It owns no weights; the model's module tree is unchanged.

    Args:
        model: The base model.
        family: The names of its modules and settings.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model: Any = model
        self.family = family
        config: Any = model.config
        last = len(family.stacks) - 1
        self.stacks = tuple(
            Stack(
                tuple(model.get_submodule(path).children()),
                config.hidden_size,
                config.num_attention_heads,
                is_causal=family.architecture.is_causal and number == last,
            )
            for number, path in enumerate(family.stacks)
        )
        self._install_shortcuts()
        self._recorder: HiddenStateRecorder | None = None

    def _install_shortcuts(self) -> None:
        self.runs_at_position = last_position.install(
            self.model,
            self.family,
            self.block_target_linears(len(self.stacks) - 1, self.stacks[-1].depth - 1, *self.family.target_linears),
            self.stacks[-1].num_heads,
        )
        if self.family.cross_attention:
            for block in self.stacks[-1].blocks:
                absorbed_cross_attention.install(block.get_submodule(self.family.cross_attention))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, from the embeddings up."""
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def embeddings(self) -> list[nn.Module]:
        """The modules before the blocks."""
        return [self.model.get_submodule(path) for path in self.family.embeddings if has_module(self.model, path)]

    @property
    def output_width(self) -> int:
        """Width of the last hidden states."""
        return int(getattr(self.model.config, self.family.hidden_size))

    def target_linears(self, *roles: Role) -> list[TargetLinear]:
        """Return the linear layers of all blocks that have one of these roles, block by block from the embeddings up.

        Raises:
            UserError: If the family has no linear layer for one of the roles.
        """
        found = [
            target
            for number, stack in enumerate(self.stacks)
            for block in range(stack.depth)
            for target in self.block_target_linears(number, block, *roles)
        ]
        if missing := set(roles) - {target.role for target in found}:
            raise UserError(
                f"The blocks of {self.model.config.model_type} have no linear layer for {', '.join(sorted(missing))}."
                f" Allowed: {', '.join(self.family.target_linears)}."
            )
        return found

    def block_target_linears(self, stack: int, block: int, *roles: Role) -> list[TargetLinear]:
        """Return the linear layers of one block that have one of these roles, role by role."""
        module, path = self.stacks[stack].blocks[block], f"{self.family.stacks[stack]}.{block}"
        leaves = {name: part for name, part in module.named_modules() if not list(part.children())}
        return [
            TargetLinear(f"{path}.{name}", linear, role, part, num_parts)
            for role in roles
            for pattern, part, num_parts in map(parse_pattern, self.family.target_linears.get(role, ()))
            for name, linear in leaves.items()
            if fnmatchcase(name, pattern)
        ]

    @property
    def all_target_linears(self) -> list[TargetLinear]:
        """The linear layers of all blocks, whatever their role."""
        return self.target_linears(*self.family.target_linears)

    def forward(self, inputs: Batch) -> Tensor:
        """Return the last stack's hidden states after its final norm, [batch, tokens, width]."""
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    def forward_at(self, inputs: Batch, position: Tensor) -> Tensor:
        """Return the states of `forward` at one position [batch] of each text, [batch, 1, width].

        If the family allows it, the last block computes no other position (see `last_position`).
        """
        if self.runs_at_position:
            inputs = {**inputs, "answer_position": position}
        hidden = self.forward(inputs)
        return hidden if hidden.shape[1] == 1 else gather_position(hidden, position)

    def hidden_states(self, inputs: Batch) -> tuple[HiddenStates, ...]:
        """Return the hidden states of all stacks."""
        if self._recorder is None:  # its hooks stay: setting them for each pass costs more than they do
            self._recorder = HiddenStateRecorder(self.stacks)
        with self._recorder.record() as (embeddings, outputs):
            self.forward(inputs)
        masks = (inputs.get("attention_mask"), *[None] * (len(self.stacks) - 1))
        return tuple(map(HiddenStates, embeddings, map(tuple, outputs), masks))

    def apply_final_modules(self, last: Tensor) -> Tensor:
        """Apply the modules after the last block, such as its final norm, to its output [batch, tokens, width]."""
        for path in self.family.final_modules:
            last = self.model.get_submodule(path)(last) if has_module(self.model, path) else last
        return last

    def enable_gradient_checkpointing(self) -> None:
        """Recompute blocks in the backward pass instead of saving their activations."""
        # transformers' own way skips blocks in evaluation mode, as frozen blocks with adapters are
        for block in self.blocks:
            override_forward(block, _recompute)


@position_wise
def _recompute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


class HiddenStateRecorder:
    """Hooks on all blocks. They record hidden states inside of `record`, and do nothing outside."""

    def __init__(self, stacks: tuple[Stack, ...]) -> None:
        self.stacks = stacks
        self._embeddings: list[Tensor] | None = None
        self._outputs: list[list[Tensor]] = []
        for number, stack in enumerate(stacks):
            stack.blocks[0].register_forward_pre_hook(self._record_input)
            for block in stack.blocks:
                block.register_forward_hook(partial(self._record_output, number))

    @contextmanager
    def record(self) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
        """Yield two lists that a forward pass fills: the input of each stack, and the outputs of its blocks."""
        self._embeddings, self._outputs = [], [[] for _ in self.stacks]
        try:
            yield self._embeddings, self._outputs
        finally:
            self._embeddings, self._outputs = None, []

    @position_wise
    def _record_input(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self._embeddings is not None:
            self._embeddings.append(args[0])

    @position_wise
    def _record_output(self, stack: int, block: nn.Module, args: Any, output: Any) -> None:
        if self._embeddings is not None:
            self._outputs[stack].append(tensor_of(output))


def find_norms(block: nn.Module) -> list[nn.Module]:
    """Return the normalisation layers of a block in the order of its parts."""
    return [part for part in block.modules() if type(part).__name__.endswith("Norm")]


def has_module(model: nn.Module, path: str) -> bool:
    """Return whether there is a module at a path."""
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def tensor_of(output: Any) -> Tensor:
    """Return the hidden state of a block's output, which may be a tuple that starts with it."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
