"""The texts that an activation cache knows: their numbers, and the positions of their tokens' states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lit_spu.backbones.cached_states import Array

TextBatch = tuple[Mapping[str, Tensor], Sequence[bytes], Sequence[Array]]
"""A batch on the host, the key of each text, and for each stack its number of tokens."""


class CachedTexts:
    """Texts with their tokens, each with a number, its text id. They are found by their keys or by a batch's `index`.

    An `index` is a number within one data set, and there may be several data sets. So it only suggests texts: their
    tokens must be equal to those of the batch.

    Args:
        data_sets: The batches of each data set.

    Attributes:
        keys: The key of each text.
        counts: For each stack the number of tokens of each text.
    """

    def __init__(self, data_sets: Iterable[Iterable[TextBatch]]) -> None:
        self._ids_by_key: dict[bytes, int] = {}
        self._ids_by_index: list[dict[int, int]] = []  # for each data set
        counts: list[list[int]] = []
        tokens: dict[str, list[Any]] = {}
        for data_set in data_sets:
            ids_by_index: dict[int, int] = {}
            self._ids_by_index.append(ids_by_index)
            for batch, keys, batch_counts in data_set:
                counts = counts or [[] for _ in batch_counts]
                inputs = _token_inputs(batch)
                for row, key in enumerate(keys):
                    if key not in self._ids_by_key:
                        self._ids_by_key[key] = len(self._ids_by_key)
                        for known, count in zip(counts, batch_counts, strict=True):
                            known.append(int(count[row]))
                        for name, values in inputs.items():
                            tokens.setdefault(name, []).append(values[row, : batch_counts[0][row]].astype(np.int32))
                if "index" in batch:
                    text_ids = [self._ids_by_key[key] for key in keys]
                    ids_by_index.update(zip(batch["index"].tolist(), text_ids, strict=True))
        self.keys = list(self._ids_by_key)
        self.counts = [np.array(known, np.int64) for known in counts]
        self._ends = [1 + known.cumsum() for known in self.counts]  # position 0 is that of padding
        self._tokens = {name: np.concatenate([[0], *arrays]).astype(np.int32) for name, arrays in tokens.items()}

    def __len__(self) -> int:
        return len(self.keys)

    def find_keys(self, keys: Sequence[bytes]) -> Array | None:
        """Return the ids of texts by their keys, or None if a key is unknown."""
        text_ids = [self._ids_by_key.get(key) for key in keys]
        return None if None in text_ids else np.array(text_ids, np.int64)

    def find(self, batch: Mapping[str, Tensor]) -> Array | None:
        """Return the ids of the texts of a batch on the host by its `index`.

        Return None unless a data set has all of these indices, with the same tokens.
        """
        if "index" not in batch:
            return None
        index = batch["index"].tolist()
        suggested = ([ids.get(number) for number in index] for ids in self._ids_by_index)
        known = (np.array(text_ids, np.int64) for text_ids in suggested if None not in text_ids)
        return next((text_ids for text_ids in known if self._have_tokens(text_ids, batch)), None)

    def _have_tokens(self, text_ids: Array, batch: Mapping[str, Tensor]) -> bool:
        """Return whether these texts are those of a batch."""
        positions = self.positions(0, text_ids, batch["input_ids"].shape[1])
        is_real = positions > 0
        mask = batch["attention_mask"].numpy() > 0 if "attention_mask" in batch else np.ones_like(is_real)
        inputs = _token_inputs(batch)
        return (
            bool((is_real == mask).all())
            and bool((is_real.sum(1) == self.counts[0][text_ids]).all())
            and inputs.keys() == self._tokens.keys()
            and all(np.array_equal(known[positions], inputs[name] * mask) for name, known in self._tokens.items())
        )

    def positions(self, stack: int, text_ids: Array, longest: int | None) -> Array:
        """Return the position of each token of some texts, 0 after the end of a text; [texts, longest].

        Args:
            stack: The stack; each numbers its positions separately.
            text_ids: The texts.
            longest: The number of tokens to which the texts are padded; None stands for the longest of them.
        """
        counts = self.counts[stack][text_ids, None]
        offsets = np.arange(counts.max() if longest is None else longest)
        return np.where(offsets < counts, self._ends[stack][text_ids, None] - counts + offsets, 0)


def _token_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a batch that have a number for each token, [batch, tokens], without the mask."""
    shape = batch["input_ids"].shape
    return {name: t.numpy() for name, t in batch.items() if t.shape == shape and name != "attention_mask"}
