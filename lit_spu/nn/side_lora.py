"""Side LoRA: a stream as wide as the backbone that borrows the outputs of its linears and learns what differs.

Every block runs twice. First on the backbone's own state, without gradient, and what its linears put out is kept. Then
on the side state, where a linear does not compute: it puts out what it did for the backbone, bias included, plus a
low-rank product of the side state. Attention, norms and non-linearities run on the side's own activations.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.weak import WeakTensorKeyDictionary

from lit_spu.backbones.base import TransformerStacks, hooks, instead, tensor_of
from lit_spu.backbones.rms_norm import rms_norm
from lit_spu.nn.lora import LowRank

Forward = Callable[..., Any]


class SideStream:
    """Runs a side state through a trunk's blocks, in step with the backbone's.

    Args:
        trunk: The backbone's stacks, frozen.
        pairs: y_s = W x_b + b + s·B(A x_s) where one is, and W x_b + b at the other linears.
        reentry: The last blocks of the last stream, as many, run once instead: on the side state, through their frozen
            weights, with their pairs beside them as in LoRA.
        recompute: Compute again in the backward pass what norms and non-linearities put out, rather than keep it for
            the pairs behind them.
    """

    def __init__(
        self, trunk: TransformerStacks, pairs: Iterable[LowRank], reentry: int = 0, recompute: bool = True
    ) -> None:
        self.trunk = trunk
        self.recompute = recompute
        self.twice = [*trunk.stacks[:-1], trunk.stacks[-1][: len(trunk.stacks[-1]) - reentry]]
        self.once = trunk.stacks[-1][len(self.twice[-1]) :]
        self.linears = {target.linear for target in trunk.all_target_linears}
        entered = {part for block in self.once for part in block.modules()}
        self.pairs: dict[nn.Module, list[LowRank]] = defaultdict(list)
        for pair in pairs:
            if pair.target.linear in entered:
                pair.attach()
            else:
                self.pairs[pair.target.linear].append(pair)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What comes out of the trunk meanwhile is the side's."""
        run = _Run(self)
        with ExitStack() as stack:
            for path in self.trunk.family.stacks[1:]:
                stack.enter_context(instead(self.trunk.model.get_submodule(path.rpartition(".")[0]), run.attending))
            for number, blocks in enumerate(self.twice):
                for block in blocks:
                    ends = block is blocks[0], block is blocks[-1]
                    both = number < len(self.twice) - 1
                    stack.enter_context(instead(block, partial(run.twice, block, *ends, both)))
            for block in self.once:
                stack.enter_context(instead(block, run.once))
            yield


class _Run:
    """One pass of both states: the side's between two blocks, and what both left for a stream that attends to it."""

    def __init__(self, stream: SideStream) -> None:
        self.stream = stream
        self.state = torch.empty(0)
        self.left: tuple[Tensor, Tensor] | None = None
        self.again = WeakTensorKeyDictionary()  # how a state is computed again, as long as something else keeps it

    def attending(self, forward: Forward, *args: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """A stream that attends to what both states left: it knows of the backbone's alone."""
        backbones, sides = encoder_hidden_states.chunk(2)
        self.left = backbones, sides
        return forward(*args, encoder_hidden_states=backbones, **kwargs)

    def once(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A block whose own state is the side's."""
        return forward(*map(self._sides, args), **{name: self._sides(arg) for name, arg in kwargs.items()})

    def twice(
        self,
        block: nn.Module,
        first: bool,
        last: bool,
        both: bool,
        forward: Forward,
        state: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A block that runs on the backbone's state, and on the side's with what its linears put out for the first."""
        linears = [part for part in block.modules() if part in self.stream.linears]
        own: dict[nn.Module, deque[Tensor]] = {linear: deque() for linear in linears}
        keep = (linear.register_forward_hook(lambda m, _, out: own[m].append(out)) for linear in linears)
        with torch.no_grad(), hooks(keep):
            output = forward(state, *args, **kwargs)
        with record_function("side"), ExitStack() as stack:
            for linear in linears:
                stack.enter_context(instead(linear, partial(self._borrow, linear, own[linear])))
            for part in block.modules() if self.stream.recompute else ():
                if not [*part.children()] and part not in self.stream.linears and not isinstance(part, nn.Embedding):
                    stack.enter_context(instead(part, partial(self._cheap, part)))
            side = state if first else self.state
            if self.stream.trunk.narrow and block is self.stream.trunk.stacks[-1][-1] and not first:
                side = self.stream.trunk.narrow(side)  # the backbone's is narrow already, by the trunk's hook
            self.state = tensor_of(self.once(forward, side, *args, **kwargs))
        if not last:
            return output
        # the model goes on with the side's, or, where a stream attends to this one, with both
        state = torch.cat([tensor_of(output), self.state]) if both else self.state
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _borrow(self, linear: nn.Module, own: deque[Tensor], forward: Forward, x: Tensor) -> Tensor:
        out = own.popleft().detach()  # what was made without gradient may be a view, which autograd would not change
        with recomputed(x, self.again[x]) if x in self.again else nullcontext():
            for pair in self.stream.pairs[linear]:
                out = pair.add_to(out, x)
        return out

    def _cheap(self, part: nn.Module, forward: Forward, *args: Any) -> Any:
        """A norm or a non-linearity: what it reads is kept for its own backward pass, and what it puts out need not."""
        norm: Any = part
        # transformers' name in RMS norms, which compute in single precision
        if hasattr(norm, "variance_epsilon") and args[0].dtype == norm.weight.dtype == torch.float32:
            forward = partial(rms_norm, weight=norm.weight, epsilon=norm.variance_epsilon)
        out = forward(*args)
        # a ReLU keeps what it puts out, too
        if out.requires_grad and out is not args[0] and not hasattr(out.grad_fn, "_saved_result"):
            self.again[out] = partial(forward, *args)
        return out

    def _sides(self, argument: Any) -> Any:
        return self.left[1] if self.left and argument is self.left[0] else argument


@contextmanager
def recomputed(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Compute a tensor again for a backward pass that wants it, instead of keeping it."""
    storage = tensor.untyped_storage()._cdata  # what is saved keeps this function, which must not keep the tensor

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else again().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
