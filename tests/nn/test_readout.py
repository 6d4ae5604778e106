"""Linear read-outs: their features by the formula, and their fit against scikit-learn."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_spu.backbones import HiddenStates
from lit_spu.errors import UserError
from lit_spu.nn.readout import PENALTIES, ReadOut, Tokens, fit_linear, select_blocks

WIDTH = 6


def states(lengths: list[int], tokens: int, depth: int = 3) -> HiddenStates:
    torch.manual_seed(0)
    mask = (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()
    blocks = tuple(3 + 2 * torch.randn(len(lengths), tokens, WIDTH) for _ in range(depth))
    return HiddenStates(blocks[0], blocks, mask)


@pytest.mark.parametrize("tokens", get_args(Tokens))
def test_features_are_normalised_states_at_the_answer_and_on_average(tokens: Any) -> None:
    lengths, position = [5, 2, 4], [4, 1, 0]
    given = states(lengths, 5)
    found = ReadOut([0, 2], WIDTH, 2, tokens).features(given, torch.tensor(position))
    expected = []
    for row in range(3):
        parts = []
        for block in (0, 2):
            state = given.blocks[block][row].numpy()
            if tokens != "mean":
                parts.append(state[position[row]])
            if tokens != "answer":
                parts.append(state[: lengths[row]].mean(0))
        expected.append(np.concatenate([(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in parts]))
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-4, atol=1e-5)


def test_padding_and_unread_blocks_change_nothing() -> None:
    given, position = states([4, 2], 4), torch.tensor([3, 0])
    assert given.mask is not None
    longer = HiddenStates(
        given.embeddings, tuple(F.pad(b, (0, 0, 0, 3), value=9.0) for b in given.blocks), F.pad(given.mask, (0, 3))
    )
    readout = ReadOut([1], WIDTH, 2, "both")
    unread = longer._replace(blocks=(None, longer.blocks[1], None))  # type: ignore[arg-type]
    torch.testing.assert_close(readout.features(unread, position), readout.features(given, position))


def test_blocks_are_chosen_by_name_or_number() -> None:
    assert select_blocks("last", 6) == [5]
    assert select_blocks("upper", 6) == [3, 4, 5]
    assert select_blocks("upper", 5) == [2, 3, 4]
    assert select_blocks("all", 3) == [0, 1, 2]
    assert select_blocks([4, 0], 6) == [0, 4]
    with pytest.raises(UserError, match=r"model.blocks=\[6\].*blocks 0 to 5"):
        select_blocks([6], 6)


def problem(num_labels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = 2 + 3 * torch.randn(80, 5, generator=generator)
    labels = (features @ torch.randn(5, num_labels, generator=generator)).argmax(-1)
    flipped = torch.rand(80, generator=generator) < 0.2
    return features, labels.where(~flipped, (labels + 1) % num_labels)


def squared_length(features: Tensor) -> float:
    return float((features - features.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_classification_is_logistic_regression(penalty: float) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = problem()
    weight, bias = fit_linear(features, labels, 3, F.cross_entropy, penalty)
    # scikit-learn minimises C · Σ loss + |w|² / 2 on the features as they are
    strength = penalty * squared_length(features)
    oracle = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=10_000).fit(features, labels)
    found = F.linear(features, weight, bias).softmax(-1)
    np.testing.assert_allclose(found, oracle.predict_proba(features), atol=2e-3)


def test_regression_is_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    features, _ = problem()
    values = features @ torch.tensor([1.0, -2, 0, 0.5, 3]) + 7
    weight, bias = fit_linear(features, values, 1, lambda x, y: F.mse_loss(x.squeeze(-1), y), 1e-2)
    # scikit-learn minimises Σ error² + α |w|²
    oracle = Ridge(alpha=1e-2 / 2 * squared_length(features) * len(values)).fit(features, values)
    np.testing.assert_allclose(F.linear(features, weight, bias).squeeze(-1), oracle.predict(features), atol=1e-2)


def test_a_fit_sets_the_layer_to_the_best_penalty() -> None:
    features, labels = problem()
    readout, tried = ReadOut([0], 5, 3, "answer"), []

    def score(logits: Tensor, given: Tensor) -> float:
        assert torch.equal(given, labels[::5])
        tried.append(logits)
        return float(len(tried) == 2)

    assert readout.fit(features, labels, F.cross_entropy, score) == PENALTIES[1]
    weight, bias = fit_linear(features, labels, 3, F.cross_entropy, PENALTIES[1])
    assert torch.equal(readout.linear.weight, weight)
    assert torch.equal(readout.linear.bias, bias)


def test_of_equal_penalties_the_strongest_is_taken() -> None:
    features, labels = problem()
    assert ReadOut([0], 5, 3, "answer").fit(features, labels, F.cross_entropy, lambda *_: 1.0) == max(PENALTIES)
