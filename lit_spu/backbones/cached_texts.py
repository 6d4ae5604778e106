"""The texts that an activation cache knows: their rows, and the positions of their tokens' states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lit_spu.backbones.cached_states import Array


class CachedTexts:
    """Texts with their tokens, found again by their keys, or by the `index` of a batch.

    An `index` is a number within one data set, and there may be several data sets. So it only suggests rows: the tokens
    of the texts must be equal.

    Args:
        batches: Batches of texts on the host, with the key of each text, and for each stack its number of tokens.

    Attributes:
        keys: The key of each row.
        counts: For each stack the number of tokens of each row.
    """

    def __init__(self, batches: Iterable[tuple[Mapping[str, Tensor], Sequence[bytes], Sequence[Array]]]) -> None:
        self._rows: dict[bytes, int] = {}
        counts: list[list[int]] = []
        tokens: dict[str, list[Any]] = {}
        by_index: list[dict[int, int]] = []
        for batch, keys, batch_counts in batches:
            counts = counts or [[] for _ in batch_counts]
            inputs = _token_inputs(batch)
            for number, key in enumerate(keys):
                if key not in self._rows:
                    self._rows[key] = len(self._rows)
                    for known, count in zip(counts, batch_counts, strict=True):
                        known.append(int(count[number]))
                    for name, values in inputs.items():
                        tokens.setdefault(name, []).append(values[number, : batch_counts[0][number]].astype(np.int32))
            for index, key in zip(batch["index"].tolist() if "index" in batch else (), keys, strict=False):
                row = self._rows[key]
                data_set = next((rows for rows in by_index if rows.get(index, row) == row), None)
                if data_set is None:
                    by_index.append(data_set := {})
                data_set[index] = row
        self.keys = list(self._rows)
        self.counts = [np.array(known, np.int64) for known in counts]
        self._ends = [1 + known.cumsum() for known in self.counts]  # position 0 is that of padding
        self._tokens = {name: np.concatenate([[0], *parts]).astype(np.int32) for name, parts in tokens.items()}
        self._rows_by_index = by_index

    def __len__(self) -> int:
        return len(self.keys)

    def find_keys(self, keys: Sequence[bytes]) -> Array | None:
        """Return the rows of texts by their keys, or None if one is unknown."""
        rows = [self._rows.get(key) for key in keys]
        return None if None in rows else np.array(rows, np.int64)

    def find(self, batch: Mapping[str, Tensor]) -> Array | None:
        """Return the rows of the texts of a batch on the host by their `index`, or None if one is unknown."""
        if "index" not in batch:
            return None
        index = batch["index"].tolist()
        suggested = ([rows.get(number) for number in index] for rows in self._rows_by_index)
        known = (np.array(rows, np.int64) for rows in suggested if None not in rows)
        return next((rows for rows in known if self._have_tokens(rows, batch)), None)

    def _have_tokens(self, rows: Array, batch: Mapping[str, Tensor]) -> bool:
        """Return whether the texts of these rows are those of a batch."""
        positions = self.positions(0, rows, batch["input_ids"].shape[1])
        is_real = positions > 0
        mask = batch["attention_mask"].numpy() > 0 if "attention_mask" in batch else np.ones_like(is_real)
        inputs = _token_inputs(batch)
        return (
            bool((is_real == mask).all())
            and bool((is_real.sum(1) == self.counts[0][rows]).all())
            and inputs.keys() == self._tokens.keys()
            and all(np.array_equal(known[positions], inputs[name] * mask) for name, known in self._tokens.items())
        )

    def positions(self, stack: int, rows: Array, longest: int | None) -> Array:
        """Return the position of each token of some texts, 0 after the end of a text; [rows, longest].

        Args:
            stack: The stack; each has positions of its own.
            rows: The texts.
            longest: The number of tokens to which the texts are padded; None stands for the longest of them.
        """
        counts = self.counts[stack][rows, None]
        steps = np.arange(counts.max() if longest is None else longest)
        return np.where(steps < counts, self._ends[stack][rows, None] - counts + steps, 0)


def _token_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a batch that have a number for each token, [batch, tokens], without the mask."""
    shape = batch["input_ids"].shape
    return {name: t.numpy() for name, t in batch.items() if t.shape == shape and name != "attention_mask"}
