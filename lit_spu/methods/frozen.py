"""Base classes of methods that freeze the backbone, and of methods that read its hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, HiddenStates, Precision
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.ranges import Text


class FrozenBackbone(Method):
    """Base class of methods that change no pretrained weight.

    Args:
        backbone_precision: Format of the frozen weights. With bf16 the backbone also computes in bf16: half of the
            memory, and half of the time if the processor supports it. int8 quantises the weights of the blocks' linear
            layers to a quarter of their memory (torchao). Trained weights are fp32.

    Raises:
        UserError: If int8 is chosen without torchao, or for a backbone that it cannot quantise.
    """

    @abstractmethod
    def __init__(self, backbone_precision: Precision = "fp32", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.freeze(backbone_precision)


class HiddenStateReader(FrozenBackbone):
    """Base class of methods that read the hidden states of a frozen backbone.

    `forward` and `loss` accept the hidden states as an argument, so that one pass of the backbone can serve several
    calls.

    Args:
        activation_cache: Run the backbone once for each text and cache its hidden states while training: in `memory`,
            or in files in this folder, which all runs share. A step on cached texts takes about a tenth of a forward
            pass. The memory that the cache needs is logged before training.
        cache_precision: Format of the cache: fp32, or bf16 or int8 for a half or a quarter of the memory.

    Raises:
        UserError: If there is no room for the cache.
    """

    @abstractmethod
    def __init__(
        self, activation_cache: Text | None = None, cache_precision: Precision = "fp32", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.activation_cache, self.cache_precision = activation_cache, cache_precision
        self.cache: ActivationCache | None = None

    def prepare(self, examples: Callable[[int], Iterable[Batch]]) -> None:
        """Prepare a new training run, for example initialise weights from data. A resumed run skips this.

        Args:
            examples: Function that yields a given number of training examples, each as a batch of one.
        """

    def hidden_states(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """Return the backbone's hidden states of all stacks."""
        with torch.no_grad(), record_function("backbone"):
            return self.backbone.hidden_states(batch) if self.cache is None else self.cache(batch)

    @abstractmethod
    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the logits [batch, labels] from the backbone's hidden states."""

    def forward(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        """Return the logits [batch, labels]. The hidden states are computed unless they are given."""
        return self.logits_from(hidden_states or self.hidden_states(batch), batch)

    def loss(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        """Return the training loss, a scalar. The hidden states are computed unless they are given."""
        return self.backbone.loss(self(batch, hidden_states), batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.trainer.ckpt_path:
            self.prepare(self._draw_examples)
        if self.activation_cache is not None:
            self._open_cache(None if self.activation_cache == "memory" else Path(self.activation_cache))

    def _open_cache(self, folder: Path | None) -> None:
        with self.trainer.precision_plugin.forward_context():  # the cache's key contains the autocast settings
            self.cache = ActivationCache(self.backbone, folder, self.cache_precision)
        texts = getattr(getattr(self.trainer, "datamodule", None), "texts", None)
        if texts is None:
            rank_zero_info(f"Cache in {self.cache.store}: its size is unknown for these data.")
            return
        plan = self.cache.plan(texts(), self.trainer.num_devices)
        rank_zero_info(
            f"Cache in {self.cache.store}: {plan.num_texts:,} texts, {plan.num_new:,} of them new, for which"
            f" {plan.num_bytes / 2**20:,.0f} MiB ({self.cache_precision}) will be cached."
        )

    def _draw_examples(self, count: int) -> Iterator[Batch]:
        draw = getattr(getattr(self.trainer, "datamodule", None), "draw", None)
        if draw is None:
            raise UserError(
                "model.init=fisher draws examples from lit_spu's GLUE data: train on them, or use magnitude."
            )
        yield from map(self.trainer.strategy.batch_to_device, draw(count))

    def teardown(self, stage: str) -> None:
        self.cache = None
