"""Measure the padding in batches and the speed of the data pipeline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lit_spu.data.batching import BucketSampler, Examples, Loader
from lit_spu.data.glue import GLUE
from lit_spu.data.text import Tokens
from lit_spu.tasks import Encoding

MAX_LENGTH = 128


@dataclass(frozen=True)
class Pipeline:
    """Ratios of padded to real tokens in an epoch for three kinds of batches, and the speed of bucketed batches."""

    name: str
    bucketed: float
    longest_in_batch: float
    to_max_length: float
    batches_per_second: float


def synthetic(examples: int, batch_size: int) -> Pipeline:
    """Measure batches of random tokens with lengths like those of SST-2's training split."""
    loader = random_texts(examples, batch_size, vocabulary=1000)
    return measure(f"synthetic, {examples} examples", loader, loader.sampler.lengths, batch_size)


def random_texts(examples: int, batch_size: int, vocabulary: int) -> Loader:
    """Make a loader of random texts: many phrases and few sentences, as in SST-2's training split."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(2.3, 0.7, examples)), 3, MAX_LENGTH).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(rng.integers(7, vocabulary, starts[-1], dtype=np.int32), starts, None)
    sampler = BucketSampler(lengths, batch_size, shuffle=True)
    return Loader(Examples(tokens, [i % 2 for i in range(examples)], pad_id=0), batch_size=None, sampler=sampler)


def glue(folder: Path, tokenizer: Path, batch_size: int) -> Pipeline:
    """Measure batches of SST-2's training split from a folder in the official layout."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    with TemporaryDirectory() as cache:
        data = GLUE(task="sst2", source=str(folder), batch_size=batch_size, max_length=MAX_LENGTH, cache=cache)
        data.encoding = Encoding(loaded, "pair", loaded.mask_token or "")
        data.setup("fit")
        loader = data.train_dataloader()
    return measure(f"SST-2, {len(loader.sampler.lengths)} examples", loader, loader.sampler.lengths, batch_size)


def measure(name: str, loader: Loader, lengths: np.ndarray[Any, np.dtype[np.int64]], batch_size: int) -> Pipeline:
    """Run one epoch, and count its tokens and batches."""
    padded = real = batches = 0
    start = time.perf_counter()
    for batch in loader:
        padded += batch["input_ids"].numel()
        real += int(batch["attention_mask"].sum())
        batches += 1
    seconds = time.perf_counter() - start
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).numpy()
    in_order = np.split(lengths[order], range(batch_size, len(lengths), batch_size))
    longest = sum(int(batch.max()) * len(batch) for batch in in_order)
    return Pipeline(
        name=name,
        bucketed=padded / real,
        longest_in_batch=longest / lengths.sum(),
        to_max_length=MAX_LENGTH * len(lengths) / lengths.sum(),
        batches_per_second=batches / seconds,
    )
