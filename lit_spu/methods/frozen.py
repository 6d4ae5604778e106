"""Base classes of methods that freeze a part of the backbone or all of it, and of those that read its hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.profiler import record_function

from lit_spu.backbones import Batch, FrozenStates, HiddenStates, Precision, StateIndices
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.ranges import CountOrZero, Text

DrawExamples = Callable[[int | None, int], Iterable[Batch]]
"""A function of a number of training examples (None for all) and a batch size that yields them in batches."""


class CachedBackbone(Method):
    """Base class of methods whose lowest blocks are frozen. They can run once for each text.

    Args:
        activation_cache: Run the frozen blocks below the lowest trained one once for each text, and cache the hidden
            states that the rest reads, while training: in `memory`, or in files in this folder, which all runs share.
            From the second epoch on a step costs the other blocks alone. The memory that the cache needs is logged
            before training. On an accelerator no callback may change the tokens of a batch. With batches of the same
            texts in each epoch, losses are equal to the bit to those without a cache. If no block is trained, they are
            equal up to rounding: without a cache, an encoder's last block runs at the answer's position alone.
        cache_precision: Format of the cache: fp32, or bf16 or int8 for a half or a quarter of the memory.
        cache_device_mib: Memory of the device that cached states may take. If the states of all texts of the data
            module fit in it, a step reads them there. Otherwise they stay in files or in the host's memory, and are
            copied to the device one batch ahead. By default it is half of what an accelerator has free before training.

    Raises:
        UserError: If no block is frozen below the lowest trained weight, or there is no room for the cache.
    """

    @abstractmethod
    def __init__(
        self,
        activation_cache: Text | None = None,
        cache_precision: Precision = "fp32",
        cache_device_mib: CountOrZero | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cache_device_mib = cache_device_mib
        self.activation_cache, self.cache_precision = activation_cache, cache_precision
        self.cache: ActivationCache | None = None
        self._num_cached_blocks = 0

    def count_frozen_blocks(self) -> int:
        """Return the number of blocks, of all stacks together, below all trained weights and adapters."""
        adapted = {adapter.target.linear for adapter in self.adapters}
        for depth, parameters in enumerate(self.parameters_by_depth):
            block = self.backbone.blocks[depth - 1] if depth else nn.Module()  # the embeddings come first
            if any(parameter.requires_grad for parameter in parameters) or not adapted.isdisjoint(block.modules()):
                return max(0, depth - 1)
        return len(self.backbone.blocks)

    def wanted_states(self) -> StateIndices | None:
        """Return the hidden states to cache: by default those that the blocks above the frozen ones read."""
        return self.backbone.base_model.states_above(self._num_cached_blocks)

    def frozen_states(self, batch: Batch) -> FrozenStates | None:
        if self.cache is None:
            return None
        with torch.no_grad():
            return FrozenStates(self._num_cached_blocks, self.cache(batch))

    def is_capturable(self, batch: Batch) -> bool:
        """Return whether a step on this batch can be replayed. One that adds states to the cache cannot."""
        return self.cache is None or self.cache.is_prepared(batch)

    def make_cache(self, folder: Path | None = None) -> ActivationCache:
        """Return a new cache in a folder, by default in memory, of the hidden states that the rest reads."""
        self._num_cached_blocks = self.count_frozen_blocks()
        return ActivationCache(self.backbone, folder, self.cache_precision, self.wanted_states())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.cache = None  # a run that failed had no teardown
        if stage == "fit" and self.activation_cache is not None and not self.count_frozen_blocks():
            fewer = ", or train fewer blocks, such as with --model.layers=2" if "layers" in self.hparams else ""
            raise UserError(
                f"model.activation_cache={self.activation_cache}: {type(self).__name__} trains weights of the lowest"
                " block with these settings, so its hidden states change in each step. Leave out"
                f" --model.activation_cache{fewer}."
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.activation_cache is not None:
            self._open_cache(None if self.activation_cache == "memory" else Path(self.activation_cache))

    def on_train_epoch_start(self) -> None:
        """Check that no callback trains a block that is cached.

        Raises:
            UserError: If one does.
        """
        super().on_train_epoch_start()
        if self.cache is not None and self.count_frozen_blocks() < self._num_cached_blocks:
            raise UserError("model.activation_cache: a callback trains blocks that are cached. Leave out one of them.")

    def _open_cache(self, folder: Path | None) -> None:
        with self.trainer.precision_plugin.forward_context():  # the cache's key contains the autocast settings
            self.cache = self.make_cache(folder)
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "texts"):
            rank_zero_info(f"Cache in {self.cache.store}: its size is unknown for these data.")
            return
        plan = self.cache.plan(*data.texts(), num_processes=self.trainer.num_devices, device_bytes=self._device_bytes())
        data.transform_batches = self.cache.prepare
        rank_zero_info(
            f"Cache in {self.cache.store}: {plan.num_texts:,} texts, {plan.num_new:,} of them new, for which"
            f" {plan.num_bytes / 2**20:,.0f} MiB ({self.cache_precision}) will be cached."
            f" {self.cache.describe_source()}"
        )

    def _device_bytes(self) -> int:
        """Return the memory of the device that cached states may take."""
        if self.cache_device_mib is not None:
            return self.cache_device_mib * 2**20
        if self.device.type == "cpu":
            return 0
        mem_get_info = getattr(torch.get_device_module(self.device), "mem_get_info", None)
        return mem_get_info(self.device)[0] // 2 if mem_get_info else 0

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.cache = None


class FrozenBackbone(CachedBackbone):
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
    """

    def prepare(self, examples: DrawExamples) -> None:
        """Prepare a new training run, for example initialise weights from data. A resumed run skips this.

        Args:
            examples: Function that yields training examples in batches. It is given their number, None for all, and
                the size of a batch.
        """

    def wanted_states(self) -> StateIndices | None:
        """Return the hidden states that the method reads; None stands for all."""
        return None

    def hidden_states(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """Return the hidden states of the frozen blocks, of all stacks."""
        with torch.no_grad(), record_function("backbone"):
            if self.cache is not None:
                return self.cache(batch)
            return self.backbone.hidden_states(batch, self.wanted_states())

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
            with self.trainer.precision_plugin.forward_context():
                self.prepare(self._draw_examples)

    def _draw_examples(self, count: int | None, batch_size: int) -> Iterator[Batch]:
        draw = getattr(getattr(self.trainer, "datamodule", None), "draw", None)
        if draw is None:
            raise UserError(
                "model.init=fisher and model.fit_readout draw examples from lit_spu's GLUE data: train on them, or"
                " leave these settings out."
            )
        yield from map(self.trainer.strategy.batch_to_device, draw(count, batch_size))
