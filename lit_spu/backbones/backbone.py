"""Base class of backbones: a pretrained model with a head that answers a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lit_spu.backbones.family import Architecture, Family
from lit_spu.backbones.label_words import label_word_error, tokenize_label_words
from lit_spu.backbones.last_position import gather_position
from lit_spu.backbones.precision import (
    Precision,
    at_least_fp32,
    compute_in_fp32,
    convert_to_bf16,
    quantize_to_int8,
)
from lit_spu.backbones.side_model import LayerIndices, explain_narrow_model, scaled_config
from lit_spu.backbones.stacks import Batch, FrozenStates, HiddenStates, Stack, StateIndices, TransformerStacks
from lit_spu.backbones.target_linears import Role, TargetLinear
from lit_spu.checkpoints.fingerprint import fingerprint
from lit_spu.errors import UserError
from lit_spu.tasks import Encoding, Format, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Head = Literal["classifier", "prompt", "names"]

HEAD_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "first": lambda hidden: hidden[:, 0],  # the only state of [batch, 1, width], see `apply_head`
    "gelu": F.gelu,
    "relu": F.relu,
}
"""Steps of a head that are not modules, by the names that Family records use."""


class Backbone(nn.Module, Architecture, ABC):
    """Base class of pretrained models that answer a task with logits [batch, labels].

    Attributes:
        model: The Hugging Face model with its own module tree and parameter names.
        base_model: Its stacks of blocks.
        encoding: Its tokenizer and the format of its examples, for the data module.
        name: The name or folder that it was loaded from.
        head_type: `classifier`, `prompt` or `names`, as chosen by the user.
        has_classifier: Whether it has a classification head. Otherwise the language-model head predicts a label word.
        new_head_reason: Why its head was created for the task; None if it was trained before.
        fingerprint: A digest of its pretrained weights.
    """

    label_token_ids: Tensor
    one_token_words: ClassVar[bool] = False  # whether a label word must be one token
    stacks_class: ClassVar[type[TransformerStacks]] = TransformerStacks

    def __init__(self, model: Any, family: Family, task: Task, head: Head, encoding: Encoding, name: str) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.encoding = encoding
        self.name = name
        self.head_type: Head = head
        self.new_head_reason: str | None = "is new."
        below_head = getattr(model, model.base_model_prefix, model)  # a model without a head is its own base model
        self.base_model = self.stacks_class(below_head, family)
        self.has_classifier = head == "classifier"
        self.head_steps = [HEAD_FUNCTIONS.get(path) or model.get_submodule(path) for path in self.head_paths]
        self.select_rows = SelectRows()
        self.label_weight: nn.Parameter | None = None
        self.label_bias: nn.Parameter | None = None
        if not self.has_classifier:
            self.register_buffer("label_token_ids", torch.tensor(self._find_label_tokens()), persistent=False)
        self.fingerprint = fingerprint(nn.ModuleList([*self.base_model.embeddings, *self.blocks]).named_parameters())
        self.train()

    @property
    def head_paths(self) -> tuple[str, ...]:
        """The steps of the head in order: paths of modules, and names in `HEAD_FUNCTIONS`."""
        family = self.base_model.family
        return family.classifier if self.has_classifier else family.vocabulary[:-1]

    @classmethod
    @abstractmethod
    def prompt_format(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        """Return the format of an example for this head, and the text of its blank."""

    # -- running ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the base model for a batch."""

    @abstractmethod
    def answer_position(self, batch: Batch) -> Tensor:
        """Return the position [batch] in the last stack whose hidden state the head reads."""

    def forward(self, batch: Batch, frozen: FrozenStates | None = None) -> Tensor:
        """Return the logits [batch, labels]. Blocks whose states are given as `frozen` do not run."""
        hidden = self.base_model.forward_at(self.model_inputs(batch), self.answer_position(batch), frozen)
        return self.apply_head(self.select_answer_state(hidden, batch))

    def hidden_states(
        self, batch: Batch, wanted: StateIndices | None = None, frozen: FrozenStates | None = None
    ) -> tuple[HiddenStates, ...]:
        """Return the hidden states of all stacks; see `TransformerStacks.hidden_states`."""
        return self.base_model.hidden_states(self.model_inputs(batch), wanted, frozen)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the logits [batch, labels] from the hidden states of all stacks."""
        last = self.base_model.apply_final_modules(hidden_states[-1].blocks[-1])
        return self.apply_head(self.select_answer_state(last, batch))

    def select_answer_state(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the state [batch, any width] that the head reads. It is at least fp32, as heads are.

        Args:
            hidden: States of the last stack, [batch, tokens, any width], or already gathered, [batch, 1, any width].
            batch: The batch.
        """
        state = hidden if hidden.shape[1] == 1 else gather_position(hidden, self.answer_position(batch))
        return at_least_fp32(state[:, 0])

    def apply_head(self, state: Tensor) -> Tensor:
        """Return the logits [batch, labels] from states [batch, width].

        A language-model head computes the logits of the label words alone. In a regression, the probability of the
        second label word is the position of the answer between the ends of the scale.
        """
        if self.has_classifier:
            state = state.unsqueeze(1)  # [batch, 1, width]: transformers' heads select a token themselves
        state = state.to(next((p.dtype for p in self.head_modules.parameters()), state.dtype))
        for step in self.head_steps:
            state = step(state)
        if self.has_classifier:
            return state
        weight, bias = self.label_head_weights()
        logits = F.linear(state.to(weight.dtype), weight, bias)
        if self.task.score_range is None:
            return logits
        low, high = self.task.score_range
        return low + (high - low) * logits.softmax(-1)[:, 1:]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy over the labels, or the squared error of a regression; a scalar, fp32 at least."""
        logits = at_least_fp32(logits)
        if self.task.regression:
            return F.mse_loss(logits.squeeze(-1), batch["labels"])
        return F.cross_entropy(logits, batch["labels"])

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions [batch] and probabilities [batch, labels]; in a regression, the values for both."""
        if self.task.regression:
            return logits.squeeze(-1), logits
        return logits.argmax(-1), logits.softmax(-1)

    def reference_logits(self, batch: Batch) -> Tensor:
        """Return what transformers' own class computes: logits of the labels, or [batch, tokens, vocabulary]."""
        logits: Tensor = self.model(**self.model_inputs(batch)).logits
        return logits

    # -- parts --------------------------------------------------------------------------------------------------------

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks in the order in which they run."""
        return self.base_model.stacks

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, from the embeddings up."""
        return self.base_model.blocks

    def last_blocks(self, count: int | None, flag: str, smallest: int = 1) -> list[nn.Module]:
        """Return the last blocks of the last stack (an encoder-decoder's decoder); None returns the blocks of all.

        Args:
            count: Number of blocks.
            flag: The flag that sets `count`.
            smallest: The smallest number that the flag allows.

        Raises:
            UserError: If the stack has fewer blocks.
        """
        if count is None:
            return self.blocks
        depth = self.stacks[-1].depth
        if count > depth:
            raise UserError(f"{flag}={count}: the backbone's last stack has {depth} blocks; use {smallest} to {depth}.")
        return self.blocks[len(self.blocks) - count :]

    @property
    def width(self) -> int:
        """Width of the hidden states that the head reads."""
        return self.base_model.output_width

    @property
    def head_modules(self) -> nn.ModuleList:
        """The modules of the head."""
        return nn.ModuleList(step for step in self.head_steps if isinstance(step, nn.Module))

    def target_linears(self, *roles: Role, blocks: Collection[nn.Module] | None = None) -> list[TargetLinear]:
        """Return the linear layers of blocks, by default of all, that have one of these roles."""
        return self.base_model.target_linears(*roles, blocks=blocks)

    def full_path(self, target: TargetLinear) -> str:
        """Return the path of a target linear in the whole model."""
        prefix = "" if self.base_model.model is self.model else f"{self.model.base_model_prefix}."
        return prefix + target.path

    def make_student(self, reduction: int, layer_indices: LayerIndices) -> Self:
        """Return a whole model of this architecture at 1/`reduction` of the width, with random weights.

        Its embeddings are as narrow as its blocks. Its tokenizer and its label words are this backbone's.

        Args:
            reduction: This backbone's width divided by the student's.
            layer_indices: The blocks of each stack that have a counterpart in the student.

        Raises:
            UserError: If `reduction` does not divide the widths, or a model of this width does not run.
        """
        config = scaled_config(self.base_model, reduction, layer_indices)
        with explain_narrow_model(self.base_model, reduction):
            model = type(self.model)(config)
            student = type(self)(model, self.base_model.family, self.task, self.head_type, self.encoding, self.name)
            student.check_runs()
        return student

    @torch.no_grad()
    def check_runs(self) -> None:
        """Compute the logits of one text of two tokens, to see any error before training."""
        ids = torch.full((1, 2), int(self.encoding.tokenizer.pad_token_id or 0))
        if is_fake(ids):
            return
        mode = self.training
        self.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self.train(mode)

    # -- training -----------------------------------------------------------------------------------------------------

    def freeze(self, precision: Precision = "fp32") -> None:
        """Freeze all weights except a classification head's, and hold those of the base model in this precision."""
        self.requires_grad_(False)
        if self.has_classifier:
            self.head_modules.requires_grad_(True)
        if precision == "int8":
            quantize_to_int8(self.base_model)
        if precision == "bf16":
            convert_to_bf16(self.base_model, set(self.head_modules))

    def unfreeze(self, module: nn.Module) -> None:
        """Train a module of a frozen backbone in fp32."""
        module.requires_grad_(True)
        if any(parameter.dtype is torch.bfloat16 for parameter in module.parameters()):
            compute_in_fp32(module.float())

    def share_frozen_weights(self, other: Backbone) -> None:
        """Use the tensors of another backbone for frozen weights that are equal in both."""
        others = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            twin = others.get(name)
            if twin is None or parameter.requires_grad or twin.requires_grad:
                continue
            if torch.equal(parameter, twin):
                parameter.data = twin.data

    def untie_head(self) -> None:
        """Train a language-model head with its own weights for the label words, untied from the embeddings."""
        if self.has_classifier:
            return
        weight, bias = self.label_head_weights()
        self.label_weight = nn.Parameter(weight.detach().clone())
        self.label_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.head_modules.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Set training mode on modules with trained weights. Frozen ones stay in evaluation mode, without dropout.

        Modules between the embeddings and the blocks, such as a T5's dropout, follow the lowest of both.
        """
        super().train(False)
        self.training = self.model.training = mode
        if mode:
            parts = {part: _is_trained(part) for part in (*self.base_model.embeddings, *self.blocks)}
            self.base_model.model.train(any(parts[part] for part in (*self.base_model.embeddings, self.blocks[0])))
            for part, is_trained in parts.items():
                part.train(is_trained)
        self.head_modules.train(mode and self.head_is_trained)
        return self

    @property
    def head_is_pretrained(self) -> bool:
        """True if the head was trained before for the labels of the task, in their order."""
        return self.new_head_reason is None

    def check_knows_answers(self, flag: str, advice: str) -> None:
        """Check that the head was trained before, so that its logits are answers.

        Raises:
            UserError: If the head is new. The message starts with `flag`, and ends in `advice`.
        """
        if self.new_head_reason is not None:
            raise UserError(f"{flag}: the classification head of {self.name} {self.new_head_reason} {advice}")

    @property
    def head_is_trained(self) -> bool:
        """True if a weight of the head is trained."""
        return self.label_weight is not None or _is_trained(self.head_modules)

    # -- label words --------------------------------------------------------------------------------------------------

    def label_head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight [labels, width] and bias [labels] of the label words, at least fp32."""
        if self.label_weight is not None:
            return self.label_weight, self.label_bias
        linear = self.model.get_submodule(self.base_model.family.vocabulary[-1])
        bias = None if linear.bias is None else at_least_fp32(linear.bias[self.label_token_ids])
        return at_least_fp32(self.select_rows(self.label_token_ids, linear.weight)), bias

    @property
    def table_readers(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """The modules that read rows of a matrix over the vocabulary, and these matrices.

        The modules are called with the row indices first. Nothing else reads the matrices in a forward pass: a matrix
        that another module has too, such as an embedding of another class, is left out.
        """
        linear = None if self.has_classifier else self.model.get_submodule(self.base_model.family.vocabulary[-1])
        readers: list[tuple[nn.Module, nn.Parameter]] = []
        if linear is not None and self.label_weight is None:
            readers.append((self.select_rows, linear.weight))
        tables = {self.model.get_input_embeddings().weight, *(weight for _, weight in readers)}
        for module in self.model.modules():
            for weight in tables.intersection(module.parameters(recurse=False)):
                if type(module) is nn.Embedding:
                    readers.append((module, weight))
                elif module is not linear:  # which is not called: its rows are selected
                    tables.remove(weight)
        return [(module, weight) for module, weight in readers if weight in tables]

    def label_word_candidates(self) -> Sequence[Sequence[str]]:
        """Return lists of label words, the preferred list first."""
        return (self.task.label_words,)

    def _find_label_tokens(self) -> list[int]:
        candidates = self.label_word_candidates()
        tokens, rejected = tokenize_label_words(self.encoding.tokenizer, candidates, self.one_token_words)
        if not tokens:
            raise label_word_error(self.task.name, self.name, rejected, self.one_token_words)
        return tokens


class SelectRows(nn.Module):
    """Selection of rows from a matrix by their indices."""

    def forward(self, row_indices: Tensor, matrix: Tensor) -> Tensor:
        """Return the rows [indices, width] of a matrix [rows, width]."""
        return F.embedding(row_indices, matrix)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
