"""What a method may ask of a pretrained model, and no more.

A `TransformerStacks` runs the stacks of an unmodified Hugging Face model and lets a caller read each block's output or
step in front of a block. A `Backbone` is such a model with a head that gives logits [batch, labels] whatever the family.
A side network is one too: the same architecture, narrower.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_spu.backbones import attention
from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.errors import UserError
from lit_spu.tasks import Encoding, Format, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]
Head = Literal["classifier", "prompt"]
Precision = Literal["fp32", "bf16", "int8"]
Role = Literal["query", "key", "value", "output", "up", "down"]
"""What a linear of a block does: makes queries, keys or values, joins the heads, widens the state or narrows it."""
Step = Callable[[Tensor], Tensor]
Enter = Callable[[int, int, Tensor], Tensor]
"""Called in front of a block with its stream, its position and the state that comes; gives the state that goes in."""

STEPS: Mapping[str, Step] = {"first": lambda hidden: hidden[:, 0], "gelu": F.gelu, "relu": F.relu}


class TargetLinear(NamedTuple):
    """A linear of a block, or a part of a fused one: the outputs of its `slot`, of as many as `slots` equal ones.

    What is put at a target is no part of the model, whose modules keep their names.
    """

    path: str  # in the base model
    linear: Any  # nn.Linear, or transformers' Conv1D, whose weight is transposed
    role: Role
    slot: int = 0
    slots: int = 1

    @property
    def transposed(self) -> bool:
        """Whether the weight lies as [inputs, outputs]."""
        return not isinstance(self.linear, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight of its outputs, [outputs, inputs]: a view."""
        return self.part(self.linear.weight)

    def part(self, whole: Tensor) -> Tensor:
        """Its part [outputs, inputs] of something that lies as the linear's weight does: a view."""
        whole = whole.T if self.transposed else whole
        return whole if self.slots == 1 else whole.chunk(self.slots)[self.slot]

    @property
    def bias(self) -> Tensor | None:
        """The bias of its outputs: a view."""
        return None if self.linear.bias is None else self.linear.bias.chunk(self.slots)[self.slot]

    def __str__(self) -> str:
        return self.path if self.slots == 1 else f"{self.path}.{self.role}"

    def outputs(self, whole: Tensor) -> Tensor:
        """Its part of what the linear puts out: a view."""
        if self.slots == 1:
            return whole
        width = whole.shape[-1] // self.slots
        return whole.narrow(-1, self.slot * width, width)


class Stream(NamedTuple):
    """One stack of blocks."""

    depth: int
    width: int
    heads: int
    causal: bool
    attends_to: int | None


class HiddenStates(NamedTuple):
    """What one stream computed: the first block's input and each block's output, [batch, tokens, width] each."""

    embeddings: Tensor
    blocks: tuple[Tensor, ...]
    mask: Tensor | None  # [batch, tokens], 1 where a token is real; None where all are


@dataclass(frozen=True)
class Family:
    """The names of one Hugging Face `model_type`.

    Paths in `stacks`, `embeddings` and `unused` start at the base model, those of the heads at the model with the head.
    A head is a chain of modules and of functions in `STEPS`; `vocabulary` ends in the linear over the vocabulary.
    """

    shape: type[Backbone]
    stacks: tuple[str, ...]  # the lists of blocks, one a stream
    embeddings: tuple[str, ...]  # what comes before the blocks; a side network goes without
    widths: tuple[str, ...]  # the settings that shrink with a side network
    vocabulary: tuple[str, ...]  # from the hidden state at the answer to the vocabulary
    classifier: tuple[str, ...] = ()  # from the last hidden states to the scores
    depths: tuple[str, ...] = ("num_hidden_layers",)  # the settings that count each stack's blocks
    head_width: str | None = None  # the setting for the width of one attention head, where there is one
    output: str = "hidden_size"  # the setting for the width of the last hidden states
    after: tuple[str, ...] = ()  # what comes behind the last block of the last stack
    unused: tuple[str, ...] = ()  # modules of the base model that no head reads through it
    reserved: int = 0  # of the model's positions, those that no token takes
    # the last name of a block's module that widens its state, where recomputing it saves memory: a ReLU keeps its
    # result alone, which the linear behind it keeps anyway
    feed_forward: str = ""
    crosses: str = ""  # the module of a block by which its stream attends to the one below
    # the linears of a block by what they do, as patterns; `c_attn:1/3` is the second third of a fused one's outputs
    target_linears: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)


class Placeholder(nn.Module):
    """Stands where a side network has no embeddings: hands on embeddings that it is given, else adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return next((a for a in given if a.dim() == 3 and a.is_floating_point()), torch.zeros(()))


class TransformerStacks:
    """The stacks of a Hugging Face base model, run as they are."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model: Any = model
        self.family = family
        self.stacks = [list(model.get_submodule(path).children()) for path in family.stacks]
        last = len(self.stacks) - 1
        # by path: other libraries put modules of their own there
        self._readers = [
            target.path for target in self.block_target_linears(last, len(self.stacks[last]) - 1, "key", "value")
        ]
        self._tapped = 0
        self.narrow: Callable[[Tensor], Tensor] | None = None
        """While `run_at` goes on: remembers all of what enters the last block, and gives it at the one position."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """One entry a stack, in the order in which they run."""
        config, last = self.model.config, len(self.stacks) - 1
        causal = self.family.shape.causal
        return tuple(
            Stream(
                len(stack),
                config.hidden_size,
                config.num_attention_heads,
                causal=causal and i == last,
                attends_to=i - 1 if i else None,
            )
            for i, stack in enumerate(self.stacks)
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, from the embeddings up."""
        return [block for stack in self.stacks for block in stack]

    @property
    def output_width(self) -> int:
        """Width of the last hidden states, which a head reads."""
        return int(getattr(self.model.config, self.family.output))

    @property
    def embeddings(self) -> list[nn.Module]:
        """The modules in front of the blocks."""
        return [self.model.get_submodule(path) for path in self.family.embeddings if has(self.model, path)]

    def target_linears(self, *roles: Role) -> list[TargetLinear]:
        """The linears of all blocks that play one of these roles, from the embeddings up, block by block.

        Raises:
            UserError: if the family has no linear for one of the roles.
        """
        found = [
            target
            for stream, stack in enumerate(self.stacks)
            for number in range(len(stack))
            for target in self.block_target_linears(stream, number, *roles)
        ]
        if missing := set(roles) - {target.role for target in found}:
            raise UserError(
                f"The blocks of {self.model.config.model_type} have no linear for {', '.join(sorted(missing))}:"
                " see `target_linears` of its Family in lit_spu/backbones/families.py."
            )
        return found

    def block_target_linears(self, stream: int, number: int, *roles: Role) -> list[TargetLinear]:
        """The linears of one block that play one of these roles, role by role."""
        block, path = self.stacks[stream][number], f"{self.family.stacks[stream]}.{number}"
        linears = {name: part for name, part in block.named_modules() if not list(part.children())}
        return [
            TargetLinear(f"{path}.{name}", linear, role, slot, slots)
            for role in roles
            for pattern, slot, slots in map(_parts, self.family.target_linears.get(role, ()))
            for name, linear in linears.items()
            if fnmatchcase(name, pattern)
        ]

    @property
    def all_target_linears(self) -> list[TargetLinear]:
        """The linears of all blocks, whatever they do."""
        return self.target_linears(*self.family.target_linears)

    @property
    def norms(self) -> list[nn.Module]:
        """The blocks' normalisation layers."""
        return [norm for block in self.blocks for norm in norms_of(block)]

    def recompute(self) -> None:
        """Recompute blocks that train in the backward pass instead of storing what they hold.

        transformers' own switch would also make the embeddings require a gradient, and so run it through frozen blocks.
        """
        self.model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))

    def recompute_feed_forwards(self) -> None:
        """Recompute in the backward pass what the blocks hold where they are widest: little work for much memory."""
        for block in self.blocks:
            for name, part in block.named_modules():
                if name and name.rpartition(".")[2] == self.family.feed_forward:
                    part.forward = partial(checkpoint, part.forward, use_reentrant=False)

    def keep_maps(self) -> None:
        """Keep for the backward pass what narrow heads attend to in short texts, rather than make it again."""
        attention.install(self.model, keep=True)

    def run(self, inputs: Batch) -> Tensor:
        """The last stream's hidden states after its last norm, [batch, tokens, width]."""
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    def run_at(self, inputs: Batch, position: Tensor) -> Tensor:
        """The same at one `position` [batch] of each text, [batch, 1, width]: no other is computed where that can be.

        That is where a block attends as `attention` does, each position is like any other to it, and nothing else is to
        be had of it: it is not tapped, nor run again in the backward pass.
        """
        block = self.stacks[-1][-1]
        alike = not self.family.shape.causal and attention.installed(self.model)
        if not alike or self._tapped or getattr(block, "gradient_checkpointing", False):
            return at(self.run(inputs), position)
        whole: list[Tensor] = []

        def enter(hidden: Tensor) -> Tensor:
            whole[:] = [hidden]
            return at(hidden, position)

        def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            tokens = args[0].shape[1]

            def of_one(value: Any) -> Any:  # masks [batch, 1, queries, keys]: all queries see the same keys
                masks = isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == tokens
                return value[:, :, :1] if masks else value

            others = {name: of_one(value) for name, value in kwargs.items()}
            return (enter(args[0]), *map(of_one, args[1:])), others

        readers = map(self.model.get_submodule, self._readers)
        with (
            hooks(iter([block.register_forward_pre_hook(narrow, with_kwargs=True)])),
            hooks(reader.register_forward_pre_hook(lambda *_: (whole[0],)) for reader in readers),
        ):
            self.narrow = enter
            try:
                return self.run(inputs)
            finally:
                self.narrow = None

    def finish(self, last: Tensor) -> Tensor:
        """What `run` gives, from the output of the last block: both [batch, tokens, width]."""
        for path in self.family.after:
            last = self.model.get_submodule(path)(last) if has(self.model, path) else last
        return last

    def taps(self, inputs: Batch) -> tuple[HiddenStates, ...]:
        """Run, and give what every block of every stream computed."""
        with self.tapped(inputs) as taps:
            self.run(inputs)
        return taps()

    @contextmanager
    def tapped(self, inputs: Batch) -> Iterator[Callable[[], tuple[HiddenStates, ...]]]:
        """Gives what every block of every stream has computed, once something runs the trunk on these inputs."""
        first: list[Tensor] = []
        outputs: list[list[Tensor]] = [[] for _ in self.stacks]

        def enter(stream: int, position: int, state: Tensor) -> Tensor:
            if position == 0:
                first.append(state)
            return state

        def taps() -> tuple[HiddenStates, ...]:
            masks = [inputs.get("attention_mask"), *[None] * (len(first) - 1)]
            return tuple(HiddenStates(*tap) for tap in zip(first, map(tuple, outputs), masks, strict=True))

        with (
            self.entered(enter),
            hooks(
                block.register_forward_hook(lambda _m, _i, out, into=into: into.append(tensor_of(out)))
                for stack, into in zip(self.stacks, outputs, strict=True)
                for block in stack
            ),
        ):
            self._tapped += 1
            try:
                yield taps
            finally:
                self._tapped -= 1

    @contextmanager
    def entered(self, enter: Enter) -> Iterator[None]:
        """Let `enter` replace what goes into each block."""

        def hook(stream: int, position: int) -> Callable[..., Any]:
            return lambda _block, args, kwargs: ((enter(stream, position, args[0]), *args[1:]), kwargs)

        with hooks(
            block.register_forward_pre_hook(hook(stream, position), with_kwargs=True)
            for stream, stack in enumerate(self.stacks)
            for position, block in enumerate(stack)
        ):
            yield

    def shrunk(self, reduction: int, keep: Sequence[Sequence[int]]) -> TransformerStacks:
        """A new trunk of this architecture at 1/`reduction` of the width, with the `keep` blocks of each stream only.

        It has no embeddings: `inputs_like` gives it something to run on, and the caller puts the state in front of the
        first block. Its weights are new.

        Raises:
            UserError: if the widths do not divide by `reduction`.
        """
        from transformers import AutoModel

        config = self.narrowed(reduction, keep)
        config.update({"vocab_size": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None})
        model = AutoModel.from_config(config, dtype=torch.float32)
        attention.install(model)
        for path in (*self.family.embeddings, *self.family.unused):
            if has(model, path):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Placeholder() if path in self.family.embeddings else None)
        return type(self)(model, self.family)

    def narrowed(self, reduction: int, keep: Sequence[Sequence[int]]) -> Any:
        """The settings of this architecture at 1/`reduction` of the width, with the `keep` blocks of each stream only.

        It has as many heads, each narrower.

        Raises:
            UserError: if the widths do not divide by `reduction`.
        """
        old, family = self.model.config, self.family
        widths = {name: getattr(old, name) for name in family.widths if getattr(old, name, None) is not None}
        head = widths.get(family.head_width or "", old.hidden_size // old.num_attention_heads)
        allowed = [
            r
            for r in range(1, head + 1)
            if not any(w % r for w in widths.values()) and not head % (r * family.shape.pairs)
        ]
        if reduction not in allowed:
            raise UserError(
                f"model.reduction={reduction} does not divide the backbone's widths ({widths}, {head} a head) evenly."
                f" Allowed: {', '.join(map(str, allowed))}."
            )
        changes: dict[str, Any] = {name: width // reduction for name, width in widths.items()}
        changes |= {name: len(kept) for name, kept in zip(family.depths, keep, strict=True)}
        if getattr(old, "layer_types", None):
            changes["layer_types"] = [old.layer_types[i] for i in keep[0]]
        return type(old).from_dict({**copy.deepcopy(old.to_dict()), **changes})

    def inputs_like(self, inputs: Batch) -> dict[str, Tensor]:
        """The same batch for a trunk without embeddings: blank states of its own width, and the same masks."""
        width, parameter = self.model.config.hidden_size, next(self.model.parameters())
        blank = {
            name.replace("input_ids", "inputs_embeds"): parameter.new_zeros(*tensor.shape, width)
            for name, tensor in inputs.items()
            if name.endswith("input_ids")
        }
        return blank | {name: tensor for name, tensor in inputs.items() if name.endswith("mask")}


class Backbone(nn.Module, ABC):
    """A pretrained model that answers a task with `scores [batch, labels]`.

    Attributes:
        model: The Hugging Face model, unmodified and with its own parameter names.
        encoding: How the data module is to write examples for it.
        name: The name or folder that it was loaded from.
        head_is_pretrained: Whether its head was trained before, and not made anew for the task.
    """

    words: Tensor
    language_model: ClassVar[str]  # which of transformers' AutoModelFor… has its language-model head
    causal: ClassVar[bool]  # whether the last stream sees only what came before
    pairs: ClassVar[int] = 1  # a head's width is a multiple of this
    whole_words: ClassVar[bool] = False  # whether a label word must be one token
    stacks_class: ClassVar[type[TransformerStacks]] = TransformerStacks

    def __init__(self, model: nn.Module, family: Family, task: Task, head: Head, encoding: Encoding, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.task = task
        self.encoding = encoding
        self.name = name
        self.head_type: Head = head
        self.head_is_pretrained = False
        self.base_model = self.stacks_class(base_of(model), family)
        if not self.causal:
            attention.install(self.base_model.model)
        self.classifies = head == "classifier" and bool(family.classifier)
        self.steps = [STEPS.get(path) or model.get_submodule(path) for path in self.head_path]
        self.rows: nn.Parameter | None = None
        self.row_bias: nn.Parameter | None = None
        if not self.classifies:
            self.register_buffer("words", torch.tensor(self.word_ids(head)), persistent=False)
        self.fingerprint = fingerprint(nn.ModuleList([*self.base_model.embeddings, *self.blocks]).named_parameters())
        self.train()

    @property
    def head_path(self) -> tuple[str, ...]:
        """What the head does one after the other: modules of the model, and functions in `STEPS`."""
        family = self.base_model.family
        return family.classifier if self.classifies else family.vocabulary[:-1]

    @classmethod
    @abstractmethod
    def reads(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        """The format in which it reads an example for that head, and the text of its blank."""

    # -- what runs --------------------------------------------------------------------------------------------------

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments with which the trunk reads a batch."""

    @abstractmethod
    def answer(self, batch: Batch) -> Tensor:
        """The position [batch] of the last stream from whose state the language-model head answers."""

    def position(self, batch: Batch) -> Tensor:
        """The position [batch] of the last stream whose state the head reads."""
        return torch.zeros_like(batch["input_ids"][:, 0]) if self.classifies else self.answer(batch)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """One entry a stack of blocks."""
        return self.base_model.streams

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, from the embeddings up."""
        return self.base_model.blocks

    def target_linears(self, *roles: Role) -> list[TargetLinear]:
        """The linears of all blocks that play one of these roles, from the embeddings up."""
        return self.base_model.target_linears(*roles)

    def path(self, target: TargetLinear) -> str:
        """A target's path in the whole model."""
        above = "" if self.base_model.model is self.model else f"{self.model.base_model_prefix}."
        return above + target.path

    @property
    def norms(self) -> list[nn.Module]:
        """The blocks' normalisation layers."""
        return self.base_model.norms

    def student(self, reduction: int, keep: Sequence[Sequence[int]]) -> Self:
        """A whole new model of this architecture, 1/`reduction` as wide, with the `keep` blocks of each stream only.

        Its weights are random, its embeddings as narrow as its blocks, and its tokenizer and answers this one's.

        Raises:
            UserError: if the widths do not divide by `reduction`.
        """
        model = type(self.model)(self.base_model.narrowed(reduction, keep))
        return type(self)(model, self.base_model.family, self.task, self.head_type, self.encoding, self.name)

    def forward(self, batch: Batch) -> Tensor:
        """Scores [batch, labels]."""
        return self.head(self.read(self.base_model.run_at(self.inputs(batch), self.position(batch)), batch))

    def trunk(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """What every block computed, per stream."""
        return self.base_model.taps(self.inputs(batch))

    def scores(self, taps: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Scores [batch, labels] from what every block computed."""
        return self.head(self.read(self.base_model.finish(taps[-1].blocks[-1]), batch))

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The one state [batch, any width] that the head reads of the last stream's [batch, tokens, any width].

        Where there is one token alone, as behind `TransformerStacks.run_at`, that is the one.
        """
        state = (hidden if hidden.shape[1] == 1 else at(hidden, self.position(batch)))[:, 0]
        return at_least_fp32(state)  # as heads are, where the blocks are not

    def head(self, state: Tensor) -> Tensor:
        """Scores [batch, labels] from the states [batch, width] that `read` gives.

        By label words only their rows of the vocabulary are computed. A regression by label words answers with the
        point between their two poles that the words' probabilities divide.
        """
        if self.classifies:
            state = state.unsqueeze(1)  # a classification head looks for the first token itself
        state = state.to(next((p.dtype for p in self.head_modules.parameters()), state.dtype))
        for step in self.steps:
            state = step(state)
        if self.classifies:
            return state
        weight, bias = self.word_rows()
        scores = F.linear(state.to(weight.dtype), weight, bias)
        if self.task.score_range is None:
            return scores
        low, high = self.task.score_range
        return low + (high - low) * scores.softmax(-1)[:, 1:]

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy over the labels, or the squared error of a regression; a scalar, in fp32 at least."""
        scores = at_least_fp32(scores)
        if self.task.regression:
            return F.mse_loss(scores.squeeze(-1), batch["labels"])
        return F.cross_entropy(scores, batch["labels"])

    def predict(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction [batch] (a label's number, or a value) and scores [batch, labels] as probabilities (or values)."""
        if self.task.regression:
            return scores.squeeze(-1), scores
        return scores.argmax(-1), scores.softmax(-1)

    # -- what learns ------------------------------------------------------------------------------------------------

    def freeze(self, precision: Precision = "fp32") -> None:
        """Freeze all that was pretrained, and hold it in that precision; a new classification head goes on learning."""
        self.requires_grad_(False)
        if self.classifies:
            self.head_modules.requires_grad_(True)
        if precision == "int8":
            self._quantise()
        if precision == "bf16":
            head = set(self.head_modules.parameters())
            for parameter in self.base_model.model.parameters():
                if parameter not in head:
                    parameter.data = parameter.data.bfloat16()
            for module in self.base_model.model.modules():  # a BERT runs its pooler by itself, too
                if module in self.steps:
                    _in_fp32(module)

    def _quantise(self) -> None:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise UserError("model.backbone_precision=int8 needs torchao: pip install 'lit-spu[int8]'.") from error
        linears = {target.linear for target in self.base_model.all_target_linears}
        if any(not isinstance(linear, nn.Linear) for linear in linears):
            raise UserError(
                f"model.backbone_precision=int8: torchao quantises nn.Linear only, which a"
                f" {self.base_model.model.config.model_type} does not have. Use bf16."
            )
        quantize_(self.base_model.model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in linears)

    def unfreeze(self, module: nn.Module) -> None:
        """Train a module of a frozen backbone after all, in fp32."""
        module.requires_grad_(True)
        if any(parameter.dtype is torch.bfloat16 for parameter in module.parameters()):
            _in_fp32(module.float())

    def share(self, other: Backbone) -> None:
        """Hold what is frozen and equal in both once: in the other's tensors."""
        theirs = dict(other.named_parameters())
        for name, own in self.named_parameters():
            one = theirs.get(name)
            if one is not None and not (own.requires_grad or one.requires_grad) and torch.equal(own, one):
                own.data = one.data

    def untie_head(self) -> None:
        """Let a language-model head learn apart from the embeddings: its label words' rows become its own weights."""
        if self.classifies:
            return
        weight, bias = self.word_rows()
        self.rows = nn.Parameter(weight.detach().clone())
        self.row_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.head_modules.requires_grad_(True)

    def train(self, mode: bool = True) -> Backbone:
        """Training mode where something learns; what is frozen stays in evaluation mode, without dropout."""
        super().train(False)
        self.training = self.model.training = mode
        if mode and any(p.requires_grad for p in self.base_model.model.parameters()):
            self.base_model.model.train()
            for part in (*self.base_model.embeddings, *self.blocks):
                part.train(any(p.requires_grad for p in part.parameters()))
        self.head_modules.train(mode and self.head_learns)
        return self

    @property
    def head_learns(self) -> bool:
        """Whether anything of the head is trained."""
        return self.rows is not None or any(p.requires_grad for p in self.head_modules.parameters())

    @property
    def head_modules(self) -> nn.ModuleList:
        """The modules of the head."""
        return nn.ModuleList(step for step in self.steps if isinstance(step, nn.Module))

    @property
    def width(self) -> int:
        """Width of the hidden states that the head reads."""
        return self.base_model.output_width

    # -- label words ------------------------------------------------------------------------------------------------

    def word_rows(self) -> tuple[Tensor, Tensor | None]:
        """The label words' rows of the vocabulary's linear, in fp32 at least: weight [labels, width], bias [labels]."""
        if self.rows is not None:
            return self.rows, self.row_bias
        linear = self.model.get_submodule(self.base_model.family.vocabulary[-1])
        bias = None if linear.bias is None else at_least_fp32(linear.bias[self.words])
        return at_least_fp32(linear.weight[self.words]), bias

    def wordings(self, head: Head) -> Sequence[Sequence[str]]:
        """The words that may stand for the labels, those that are preferred first."""
        return (self.task.label_words,)

    def word_ids(self, head: Head) -> list[int]:
        """The token that answers for each label, as it reads behind other words: a word's first, or all of it.

        Raises:
            UserError: if two labels would have the same, or one has none.
        """
        tokenizer, before = self.encoding.tokenizer, "It was"
        skip = len(tokenizer(before, add_special_tokens=False).input_ids)
        spelled = []
        for words in self.wordings(head):
            pieces = [tokenizer(f"{before} {word}", add_special_tokens=False).input_ids[skip:] for word in words]
            first = [ids[0] for ids in pieces if ids and ids[0] != tokenizer.unk_token_id]
            if len(set(first)) == len(words) and (not self.whole_words or all(len(ids) == 1 for ids in pieces)):
                return first
            spelled += [
                f"{w} = {' '.join(tokenizer.convert_ids_to_tokens(ids))}" for w, ids in zip(words, pieces, strict=True)
            ]
        raise UserError(
            f"The label words of {self.task.name} cannot answer in {self.name}, where each must be a known token of its"
            f" own{'' if self.whole_words else ', or start with one'}: {'; '.join(spelled)}."
            " Give other label_words in the task's YAML file"
            f"{', or use --model.head=classifier' if self.base_model.family.classifier else ''}."
        )


def norms_of(block: nn.Module) -> list[nn.Module]:
    """The normalisation layers of a block, in the order of what they belong to."""
    return [part for part in block.modules() if type(part).__name__.endswith("Norm")]


def base_of(model: Any) -> nn.Module:
    """The model below the head; a model without a base of its own is its own base."""
    base: nn.Module = getattr(model, model.base_model_prefix, model)
    return base


def has(model: nn.Module, path: str) -> bool:
    """Whether a module lies at `path`."""
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _in_fp32(module: nn.Module) -> None:
    """Let a module compute in fp32 among others that do not."""

    def forward(inner: Step, x: Tensor) -> Tensor:
        return inner(x.float()).to(x.dtype)

    module.forward = partial(forward, module.forward)


def _parts(pattern: str) -> tuple[str, int, int]:
    """`c_attn:1/3` as the pattern of a name, the slot and how many slots there are."""
    name, _, part = pattern.partition(":")
    slot, _, slots = part.partition("/")
    return name, int(slot or 0), int(slots or 1)


def at(hidden: Tensor, position: Tensor) -> Tensor:
    """The states [batch, 1, width] at one position [batch] of each text's [batch, tokens, width]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position].unsqueeze(1)


def at_least_fp32(x: Tensor) -> Tensor:
    """The same, unless it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tensor_of(output: Any) -> Tensor:
    """The hidden state of a block's output, which may be a tuple that starts with it."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@contextmanager
def hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Hold hooks for the length of a block, and remove them whatever happens."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def instead(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Let a module answer by a function of its own forward and its arguments for a while."""
    before = vars(module).get("forward")
    module.forward = partial(answer, module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
