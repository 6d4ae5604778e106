"""The stacks of transformer blocks of a Hugging Face base model, and the hidden states that they compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_spu.backbones import absorbed_cross_attention, last_position, norms
from lit_spu.backbones.family import Family
from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.backbones.last_position import gather_position
from lit_spu.backbones.partial_pass import PartialStack
from lit_spu.backbones.target_linears import Role, TargetLinear, parse_pattern
from lit_spu.errors import UserError

Batch = Mapping[str, Tensor]

StateIndices = Sequence[Collection[int]]
"""For each stack, numbers of hidden states: 0 is the first block's input, and i + 1 the output of block i."""


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
    """Hidden states of one stack: its first block's input and the outputs of its blocks, [batch, tokens, width].

    States that were not asked for are None.
    """

    embeddings: Tensor
    blocks: tuple[Tensor, ...]
    mask: Tensor | None  # [batch, tokens], 1 where a token is real; None if all are

    @classmethod
    def select(cls, states: Mapping[int, Tensor], depth: int, mask: Tensor | None) -> HiddenStates:
        """Return the hidden states of a stack of `depth` blocks from some of them by their numbers."""
        embeddings, *blocks = (cast(Tensor, states.get(number)) for number in range(depth + 1))
        return cls(embeddings, tuple(blocks), mask)


class FrozenStates(NamedTuple):
    """Hidden states of the lowest blocks, above which a forward pass starts.

    For each stack they contain the output of its last block that does not run.
    """

    num_blocks: int  # of all stacks together, from the embeddings up
    stacks: Sequence[HiddenStates]


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
        self._partial_stacks: list[PartialStack] | None = None

    def _install_shortcuts(self) -> None:
        norms.install(self.model)
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

    def target_linears(self, *roles: Role, blocks: Collection[nn.Module] | None = None) -> list[TargetLinear]:
        """Return the linear layers of blocks that have one of these roles, block by block from the embeddings up.

        Args:
            roles: Roles of the linear layers.
            blocks: The blocks to search; None searches all.

        Raises:
            UserError: If the family has no linear layer for one of the roles.
        """
        found = [
            target
            for number, stack in enumerate(self.stacks)
            for block in range(stack.depth)
            if blocks is None or stack.blocks[block] in blocks
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

    def forward_at(self, inputs: Batch, position: Tensor, frozen: FrozenStates | None = None) -> Tensor:
        """Return the states of `forward` at one position [batch] of each text, [batch, 1, width].

        If the family allows it, the last block computes no other position (see `last_position`). With frozen states,
        their blocks do not run.
        """
        if self.runs_at_position:
            inputs = {**inputs, "answer_position": position}
        with self._run_blocks(frozen):
            hidden = self.forward(inputs)
        return hidden if hidden.shape[1] == 1 else gather_position(hidden, position)

    def hidden_states(
        self, inputs: Batch, wanted: StateIndices | None = None, frozen: FrozenStates | None = None
    ) -> tuple[HiddenStates, ...]:
        """Return the hidden states of all stacks.

        Args:
            inputs: The arguments of the base model.
            wanted: The states to return; None returns all. Blocks above all of these do not run.
            frozen: States of the lowest blocks, which do not run. They must contain those of their blocks in `wanted`.
        """
        if self._recorder is None:  # its hooks stay: setting them for each pass costs more than they do
            self._recorder = HiddenStateRecorder(self.stacks)
        with self._run_blocks(frozen, wanted), self._recorder.record(wanted or self.all_states()) as found:
            self.forward(inputs)
        if frozen:
            for states, known, count in zip(found, frozen.stacks, self.count_by_stack(frozen.num_blocks), strict=True):
                states.update({number: known.blocks[number - 1] for number in states if 0 < number <= count})
        masks = (inputs.get("attention_mask"), *[None] * (len(self.stacks) - 1))
        return tuple(map(HiddenStates.select, found, (stack.depth for stack in self.stacks), masks))

    def all_states(self) -> StateIndices:
        """Return the numbers of all hidden states."""
        return [range(stack.depth + 1) for stack in self.stacks]

    def states_above(self, num_blocks: int) -> StateIndices:
        """Return the hidden states that a pass reads if its lowest blocks, `num_blocks` of all stacks, do not run.

        If no block runs, the last stack's output is read alone.
        """
        counts = self.count_by_stack(num_blocks)
        if num_blocks == len(self.blocks):
            counts[:-1] = [0] * (len(counts) - 1)
        return [[count] if count else [] for count in counts]

    def blocks_above(self, wanted: StateIndices) -> list[nn.Module]:
        """Return the blocks that none of these hidden states depends on."""
        return self.blocks[self._count_below(wanted) :]

    def _count_below(self, wanted: StateIndices | None) -> int:
        """Return the number of blocks, of all stacks together, up to the highest of these hidden states."""
        if wanted is None:
            return len(self.blocks)
        starts = accumulate((stack.depth for stack in self.stacks), initial=0)
        return max(start + max(numbers, default=-start) for start, numbers in zip(starts, wanted, strict=False))

    def count_by_stack(self, num_blocks: int) -> list[int]:
        """Return how many of the lowest `num_blocks` blocks of all stacks are in each stack."""
        starts = accumulate((stack.depth for stack in self.stacks), initial=0)
        return [max(0, min(stack.depth, num_blocks - start)) for stack, start in zip(self.stacks, starts, strict=False)]

    @contextmanager
    def _run_blocks(self, frozen: FrozenStates | None, wanted: StateIndices | None = None) -> Iterator[None]:
        """Context manager in which no block runs whose output is frozen, or above all wanted states."""
        if frozen is None and wanted is None:
            yield
            return
        starts = self.count_by_stack(frozen.num_blocks if frozen else 0)
        ends = self.count_by_stack(self._count_below(wanted))
        if self._partial_stacks is None:
            self._partial_stacks = [PartialStack(stack.blocks) for stack in self.stacks]
        with ExitStack() as passes:
            for number, (part, start, end) in enumerate(zip(self._partial_stacks, starts, ends, strict=True)):
                below = frozen.stacks[number].blocks[start - 1] if frozen and start else None
                passes.enter_context(part.run_only(range(start, max(start, end)), below))
            yield

    @property
    def final_modules(self) -> list[nn.Module]:
        """The modules after the last block, such as its final norm."""
        return [self.model.get_submodule(path) for path in self.family.final_modules if has_module(self.model, path)]

    def apply_final_modules(self, last: Tensor) -> Tensor:
        """Apply the modules after the last block to its output [batch, tokens, width]."""
        for module in self.final_modules:
            last = module(last)
        return last

    def apply_final_norm(self, last: Tensor) -> Tensor:
        """Apply the norm after the last block, if there is one, to its output [batch, tokens, width]."""
        for module in self.final_modules:
            last = module(last) if find_norms(module) == [module] else last
        return last

    def enable_gradient_checkpointing(self, only_on: str | None = None) -> None:
        """Recompute blocks in the backward pass instead of saving their activations.

        Args:
            only_on: Type of device; on others, nothing is recomputed. By default all recompute.
        """
        # transformers' own way skips blocks in evaluation mode, as frozen blocks with adapters are
        for block in self.blocks:
            override_forward(block, partial(_recompute, only_on))


@position_wise
def _recompute(only_on: str | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or only_on not in (None, args[0].device.type):
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


class HiddenStateRecorder:
    """Hooks on all blocks. They record hidden states inside of `record`, and do nothing outside."""

    def __init__(self, stacks: tuple[Stack, ...]) -> None:
        self.stacks = stacks
        self._wanted: StateIndices = ()
        self._found: list[dict[int, Tensor]] = []
        for number, stack in enumerate(stacks):
            stack.blocks[0].register_forward_pre_hook(partial(self._record_input, number))
            for index, block in enumerate(stack.blocks):
                block.register_forward_hook(partial(self._record_output, number, index + 1))

    @contextmanager
    def record(self, wanted: StateIndices) -> Iterator[list[dict[int, Tensor]]]:
        """Yield for each stack a dict that a forward pass fills with the wanted states by their numbers."""
        self._wanted = wanted
        self._found = [{} for _ in self.stacks]
        try:
            yield self._found
        finally:
            self._wanted, self._found = (), []

    @position_wise
    def _record_input(self, stack: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self._found and 0 in self._wanted[stack]:
            self._found[stack][0] = args[0]

    @position_wise
    def _record_output(self, stack: int, index: int, block: nn.Module, args: Any, output: Any) -> None:
        if self._found and index in self._wanted[stack]:
            self._found[stack][index] = tensor_of(output)


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
