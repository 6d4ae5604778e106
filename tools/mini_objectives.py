"""Pretraining objectives of the mini models: masked words for encoders, corrupted spans for encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tools.mini_text import NUM_SENTINELS

IGNORED = -100
"""The label that the losses of transformers ignore."""

HIDDEN_SHARE = 0.2
"""Share of the tokens to predict."""

SPAN_LENGTH = 1.5
"""Mean number of tokens in a corrupted span."""

Inputs = dict[str, Tensor]
Objective = Callable[[Sequence[Tensor], Random], Inputs]
"""Returns the inputs of a model, labels included, for texts as token ids; random choices use the generator."""


def pad(rows: Sequence[Tensor], value: int) -> Tensor:
    """Return the rows as one int64 matrix [rows, longest], padded with `value`."""
    return pad_sequence([row.long() for row in rows], batch_first=True, padding_value=value)


def masked_words(tokenizer: Any) -> Objective:
    """Return the objective to predict a share of the tokens: 80 % masked, 10 % replaced, 10 % unchanged.

    Half of the texts with several sentences are split into two segments, as pairs of sentences are.
    """
    cls, sep = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])
    stops = torch.tensor(tokenizer.convert_tokens_to_ids([".", "?", "!"]))
    special = torch.tensor(tokenizer.all_special_ids)
    segments = "token_type_ids" in tokenizer.model_input_names

    def make_inputs(rows: Sequence[Tensor], rng: Random) -> Inputs:
        texts, types = [], []
        for row in rows:
            ends = (torch.isin(row[:-1], stops).nonzero().flatten() + 1).tolist() if rng.random() < 0.5 else []
            first, second = row.tensor_split([rng.choice(ends)]) if ends else (row, row[:0])
            texts.append(torch.cat([cls, first, sep, *([second, sep] if ends else [])]))
            types.append((torch.arange(len(texts[-1])) > len(first) + 1).long())
        ids = pad(texts, tokenizer.pad_token_id)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        chance, choice = torch.rand(2, *ids.shape, generator=noise)
        predicted = (chance < HIDDEN_SHARE) & ~torch.isin(ids, special)
        labels = ids.where(predicted, IGNORED)
        attention = pad([torch.ones(len(text)) for text in texts], 0)
        replacement = torch.randint(len(tokenizer), ids.shape, generator=noise)
        ids = ids.masked_fill(predicted & (choice < 0.8), tokenizer.mask_token_id)
        ids = ids.where(~predicted | (choice < 0.9), replacement)
        return {
            "input_ids": ids,
            "attention_mask": attention,
            "labels": labels,
            **({"token_type_ids": pad(types, 0)} if segments else {}),
        }

    return make_inputs


def corrupted_spans(tokenizer: Any) -> Objective:
    """Return the objective to predict spans that a sentinel replaces; in the labels, each follows its sentinel."""
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(NUM_SENTINELS)])
    eos = [tokenizer.eos_token_id]

    def split_number(rng: Random, total: int, count: int) -> list[int]:
        """Return `count` random positive numbers whose sum is `total`."""
        cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
        return [b - a for a, b in pairwise(cuts)]

    def corrupt(row: list[int], rng: Random) -> tuple[Tensor, Tensor]:
        hidden = max(1, round(len(row) * HIDDEN_SHARE))
        spans = min(max(1, round(hidden / SPAN_LENGTH)), len(row) - hidden + 1, NUM_SENTINELS)
        # the two outer gaps may be empty, so that each counts one token more
        gaps = split_number(rng, len(row) - hidden + 2, spans + 1)
        text: list[int] = []
        labels: list[int] = []
        position = -1
        for sentinel, gap, span in zip(sentinels, gaps, split_number(rng, hidden, spans), strict=False):
            text += [*row[max(position, 0) : position + gap], sentinel]
            labels += [sentinel, *row[position + gap : position + gap + span]]
            position += gap + span
        return torch.tensor(text + row[position:] + eos), torch.tensor(labels + eos)

    def make_inputs(rows: Sequence[Tensor], rng: Random) -> Inputs:
        texts, labels = zip(*(corrupt(row.tolist(), rng) for row in rows), strict=True)
        ids = pad(texts, tokenizer.pad_token_id)
        attention = pad([torch.ones(len(text)) for text in texts], 0)
        return {"input_ids": ids, "attention_mask": attention, "labels": pad(labels, IGNORED)}

    return make_inputs
