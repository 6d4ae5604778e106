"""Side LoRA: a side state as wide as the backbone's, which reuses the outputs of the backbone's linear layers.

Every block runs twice. First it runs on the backbone's own state, without gradients, and the outputs of its linear
layers are saved. Then it runs on the side state. Now a linear layer multiplies by no weight: it returns its saved
output, bias included, plus a low-rank product of the side state. Attention, norms and non-linearities run on the side's
own activations.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.weak import WeakTensorKeyDictionary

from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.backbones.stacks import TransformerStacks, tensor_of
from lit_spu.nn.lora import LowRank

Forward = Callable[..., Any]


class SideStream:
    """Forward overrides that run a side state through the backbone's blocks.

    They are set once, and do nothing outside of `activate`.

    Args:
        base_model: The backbone's stacks, frozen.
        pairs: Low-rank pairs on linear layers. A layer with a pair outputs y_s = W x_b + b + s·B(A x_s), a layer
            without one W x_b + b.
        reentry: Number of the last blocks of the last stack that run once, on the side state alone, through their
            frozen weights and with their pairs attached as in LoRA.
        recompute: Recompute the outputs of norms and non-linearities in the backward pass, instead of saving them for
            the pairs of the next linear layers.
    """

    def __init__(
        self, base_model: TransformerStacks, pairs: Iterable[LowRank], reentry: int = 0, recompute: bool = True
    ) -> None:
        self.recompute = recompute
        *lower, last = (stack.blocks for stack in base_model.stacks)
        run_twice, side_only = last[: len(last) - reentry], last[len(last) - reentry :]
        self.linears = {target.linear for target in base_model.all_target_linears}
        reentered = {part for block in side_only for part in block.modules()}
        self.pairs: dict[nn.Module, list[LowRank]] = defaultdict(list)
        for pair in pairs:
            if pair.target.linear in reentered:
                pair.attach()
            else:
                self.pairs[pair.target.linear].append(pair)
        self._pass: _Pass | None = None
        self._override_stacks(base_model)
        for number, blocks in enumerate([*lower, run_twice]):
            for block in blocks:
                self._override_block(block, block is blocks[0], block is blocks[-1], number < len(lower))
        for block in side_only:
            override_forward(block, partial(self._forward, _Pass.run_side_only))

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Context manager in which the model returns the side's hidden states instead of the backbone's."""
        self._pass = _Pass(self)
        try:
            yield
        finally:
            self._pass = None

    def _override_stacks(self, base_model: TransformerStacks) -> None:
        for path in base_model.family.stacks[1:]:
            stack = base_model.model.get_submodule(path.rpartition(".")[0])
            override_forward(stack, partial(self._forward, _Pass.split_encoder_states))

    def _override_block(self, block: nn.Module, is_first: bool, is_last: bool, joins: bool) -> None:
        run = partial(_Pass.run_frozen_then_side, is_first=is_first, is_last=is_last, joins=joins)
        override_forward(block, partial(self._forward, run))
        for part in block.modules():
            if part in self.linears:
                override_forward(part, partial(self._forward, partial(_Pass.run_linear, linear=part)))
            elif self.recompute and not [*part.children()] and not isinstance(part, nn.Embedding):
                override_forward(part, partial(self._forward, _Pass.run_recomputable))

    @position_wise
    def _forward(self, run: Callable[..., Any], forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a module's forward, or in an active pass a method of the pass instead."""
        return forward(*args, **kwargs) if self._pass is None else run(self._pass, forward, *args, **kwargs)


class _Pass:
    """The state of one forward pass, and the forwards that replace those of the model's modules in it."""

    def __init__(self, stream: SideStream) -> None:
        self.stream = stream
        self.side_state = torch.empty(0)  # after the block that ran last
        self.encoder_states: tuple[Tensor, Tensor] | None = None  # for a decoder: the backbone's and the side's
        self.runs_side = False  # whether the present block is in its second run, on the side state
        self.frozen_outputs: dict[nn.Module, deque[Tensor]] = defaultdict(deque)  # by linear layer, of the first run
        self.recompute_fns = WeakTensorKeyDictionary()  # by tensor, as long as something else holds the tensor

    def split_encoder_states(self, forward: Forward, *args: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """Split the encoder states, joined along the batch, and run a decoder stack on the backbone's."""
        frozen, side = encoder_hidden_states.chunk(2)
        self.encoder_states = frozen, side
        return forward(*args, encoder_hidden_states=frozen, **kwargs)

    def run_side_only(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a block on the side state, which attends to the side's encoder states."""
        return forward(*map(self._side_of, args), **{name: self._side_of(value) for name, value in kwargs.items()})

    def run_frozen_then_side(
        self, forward: Forward, state: Tensor, *args: Any, is_first: bool, is_last: bool, joins: bool, **kwargs: Any
    ) -> Any:
        """Run a block on the backbone's state, then on the side state with the first run's linear outputs.

        At the first block of a stack, the side state equals the backbone's `state` [batch, tokens, width]. The last
        block returns the side state. If another stack attends to this one (`joins`), it returns both states, joined
        along the batch.
        """
        with torch.no_grad():
            output = forward(state, *args, **kwargs)
        self.runs_side = True
        with record_function("side"):
            side = state if is_first else self.side_state
            self.side_state = tensor_of(self.run_side_only(forward, side, *args, **kwargs))
        self.runs_side = False
        if not is_last:
            return output
        state = torch.cat([tensor_of(output), self.side_state]) if joins else self.side_state
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def run_linear(self, forward: Forward, x: Tensor, linear: nn.Module) -> Tensor:
        """In the first run, save a linear layer's output. In the second, add the low-rank product of x to it."""
        outputs = self.frozen_outputs[linear]
        if self.runs_side:
            return self._low_rank_on_frozen_output(linear, outputs.popleft(), x)
        outputs.append(forward(x))
        return outputs[-1]

    def _low_rank_on_frozen_output(self, linear: nn.Module, output: Tensor, x: Tensor) -> Tensor:
        output = output.detach()  # autograd refuses to change a view in place that was made without gradients
        with recomputed(x, self.recompute_fns[x]) if x in self.recompute_fns else nullcontext():
            for pair in self.stream.pairs[linear]:
                output = pair.add_to(output, x)
        return output

    def run_recomputable(self, forward: Forward, *args: Any) -> Any:
        """Run a module without parts, such as a norm or a non-linearity, and note the call that recomputes its output.

        The backward pass of such a module saves its input, from which its output can be recomputed.
        """
        if not self.runs_side:
            return forward(*args)
        output = forward(*args)
        # a ReLU saves its output, so nothing is gained by recomputing it
        if output.requires_grad and output is not args[0] and not hasattr(output.grad_fn, "_saved_result"):
            self.recompute_fns[output] = partial(forward, *args)
        return output

    def _side_of(self, argument: Any) -> Any:
        frozen, side = self.encoder_states or (None, None)
        return side if argument is frozen and frozen is not None else argument


@contextmanager
def recomputed(tensor: Tensor, recompute_fn: Callable[[], Tensor]) -> Iterator[None]:
    """Context manager in which operations do not save a tensor, but recompute it in the backward pass."""
    storage = tensor.untyped_storage()._cdata  # not the tensor, which the hooks would hold as long as the graph

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else recompute_fn().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
