"""SPSA against the gradient that it estimates, and what a step changes."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.backbone import SelectRows
from lit_spu.errors import UserError
from lit_spu.measure import LiveBytes
from lit_spu.optim.mezo import NOISES, MeZOOptimizer, delay_sigint
from lit_spu.optim.noise import VERSION

noises = pytest.mark.parametrize("noise", NOISES)


def bowl(dimensions: int = 50, cubic: float = 0.0) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """Return a random weight and its loss: a quadratic, with a cubic term on top."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(dimensions, dtype=torch.float64, generator=generator))
    curve = torch.randn(dimensions, dimensions, dtype=torch.float64, generator=generator)
    curve = curve @ curve.T / dimensions
    return weight, lambda: weight @ (curve @ weight) / 2 + cubic * (weight * weight * weight).sum()


def gradient(weight: nn.Parameter, loss: Callable[[], Tensor]) -> Tensor:
    return torch.autograd.grad(loss(), weight)[0]


def z_of(optimizer: MeZOOptimizer, weight: Tensor, direction: int = 0) -> Tensor:
    return optimizer.sample(direction)[weight].to(weight.dtype)


def moved(optimizer: MeZOOptimizer, weight: nn.Parameter, loss: Callable[[], Tensor], num_examples: int = 1) -> Tensor:
    """Return the change of a weight in one step, and undo it."""
    before = weight.detach().clone()
    optimizer.step(loss, num_examples)
    moved = weight.detach() - before
    with torch.no_grad():
        weight.copy_(before)
    return moved


@noises
def test_the_slope_of_a_quadratic_is_exact(noise: Any) -> None:
    weight, loss = bowl()
    optimizer = MeZOOptimizer([weight], lr=1.0, noise=noise, epsilon=1e-2)
    z, slope = z_of(optimizer, weight), gradient(weight, loss)
    torch.testing.assert_close(moved(optimizer, weight, loss), -(z @ slope) * z, atol=1e-5, rtol=1e-6)


def test_a_cubic_adds_its_third_order_term() -> None:
    """g = z·∇L + ε²·c·Σz³: the error falls with the square of ε."""
    weight, loss = bowl(cubic=0.4)
    for epsilon in (0.1, 0.05, 0.025):
        optimizer = MeZOOptimizer([weight], lr=1.0, epsilon=epsilon)
        z = z_of(optimizer, weight)
        slope = z @ gradient(weight, loss) + epsilon**2 * 0.4 * (z**3).sum()
        torch.testing.assert_close(moved(optimizer, weight, loss), -slope * z, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("directions", [1, 4])
def test_the_estimate_is_unbiased_with_the_expected_variance(directions: int) -> None:
    """Its mean is the gradient within four standard errors, and E|ĝ|² = |∇L|²·(d + n + 1)/n for normal z."""
    weight, loss = bowl(20)
    slope, count = gradient(weight, loss), 2000
    optimizer = MeZOOptimizer([weight], lr=1.0, epsilon=1e-3, directions=directions)
    estimates = torch.stack([-moved(optimizer, weight, loss) for _ in range(count)])
    error = 4 * math.sqrt((20 + 1) / (count * directions)) * float(slope.norm())
    assert float((estimates.mean(0) - slope).norm()) < error
    square = float(estimates.square().sum(1).mean() / slope.square().sum())
    assert square == pytest.approx((20 + directions + 1) / directions, rel=0.1)


def test_the_loss_falls() -> None:
    weight, loss = bowl()
    optimizer = MeZOOptimizer([weight], lr=5e-3)
    first = float(loss().detach())
    for _ in range(500):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.1 * first


@noises
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_evaluations_do_not_change_the_weights(noise: Any, dtype: torch.dtype) -> None:
    """The published algorithm (+ε, −2ε, +ε) drifts by 2e-6 in fp32 and 0.12 in bf16 after 1000 steps."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4), nn.LayerNorm(4)).to(dtype)
    before, x = copy.deepcopy(model.state_dict()), torch.randint(20, (6,))
    optimizer = MeZOOptimizer(model.named_parameters(), lr=0.0, noise=noise)
    for _ in range(50):
        optimizer.step(lambda: model(x).float().square().mean())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@noises
@pytest.mark.parametrize(("rounding", "error"), [("residual", 0.01), ("stochastic", 0.3), ("nearest", 0.1)])
def test_small_steps_add_up_in_half_precision(noise: Any, rounding: Any, error: float) -> None:
    """Every single step is a hundredth of the distance between two bf16 numbers. The nearest one is where it began."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(64, 32, bias=False)
        nn.init.ones_(linear.weight)
        linear.to(dtype)
        optimizer = MeZOOptimizer(linear.named_parameters(), lr=1.0, noise=noise, rounding=rounding)
        for _ in range(400):
            optimizer.apply_slopes([1e-4])
        residual = optimizer.state[linear.weight].get("rounding_residual", torch.zeros(1))
        ends.append(linear.weight.detach().float() + residual.float())
    direction = ends[0] - 1
    found = float(((ends[1] - 1) * direction).sum() / direction.square().sum())  # how far along the intended path
    assert found == pytest.approx(0.0 if rounding == "nearest" else 1.0, abs=error)


@pytest.mark.parametrize("error", [True, False])
def test_other_weights_and_global_generators_stay(error: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    optimizer = MeZOOptimizer(list(model[0].named_parameters()), lr=0.1)
    x, before = torch.randn(6, 8), copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]

    def loss() -> Tensor:
        found: Tensor = model(x).square().mean()
        if error:
            raise KeyboardInterrupt
        return found

    if error:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(loss)
    else:
        optimizer.step(loss)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == (set() if error else {"0.weight", "0.bias"})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert all(p.grad is None for p in model.parameters())


def test_sigint_is_delayed_to_the_end_of_an_evaluation() -> None:
    """The KeyboardInterrupt follows the evaluation. Weights, forwards and autocast's cache are as before."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    losses: list[Tensor] = []
    before, handler = copy.deepcopy(model.state_dict()), signal.getsignal(signal.SIGINT)

    def loss() -> Tensor:
        signal.raise_signal(signal.SIGINT)
        losses.append(model(x).square().mean())
        return losses[-1]

    with pytest.raises(KeyboardInterrupt):
        MeZOOptimizer(model.named_parameters(), lr=0.1, blocks=[model[0]]).step(loss)
    assert len(losses) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model)
    assert torch.is_autocast_cache_enabled()


def test_a_second_sigint_is_not_delayed() -> None:
    signals = iter([signal.SIGINT] * 3)
    with pytest.raises(KeyboardInterrupt), delay_sigint():
        list(map(signal.raise_signal, signals))
    assert len(list(signals)) == 1


def test_sigint_during_an_update_leaves_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those that the history leads to."""
    ends = []
    for interrupts in (False, True):
        weights = [("a", nn.Parameter(torch.ones(4))), ("b", nn.Parameter(torch.ones(4)))]
        optimizer = MeZOOptimizer(weights, lr=0.1, share=0.99)  # two units
        if interrupts:
            update, signals = optimizer._update, iter([signal.SIGINT])
            interrupted = lambda *args: (update(*args), *map(signal.raise_signal, signals))  # noqa: B023, E731
            monkeypatch.setattr(optimizer, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt) if interrupts else nullcontext():
            optimizer.apply_slopes([1.0])
        ends.append(torch.cat([weight.detach() for _, weight in weights]))
        assert optimizer.param_groups[0]["step"] == 1
    assert torch.equal(*ends)


def test_the_mean_of_equal_directions_is_that_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeZOOptimizer, "_key", lambda optimizer, direction: optimizer.param_groups[0]["step"])
    weight, loss = bowl()
    once, twice = (moved(MeZOOptimizer([weight], lr=0.1, directions=n), weight, loss) for n in (1, 2))
    torch.testing.assert_close(twice, once, atol=1e-12, rtol=1e-12)


def test_groups_have_their_weight_decay_and_learning_rate() -> None:
    one, two = (nn.Parameter(torch.ones(5)) for _ in range(2))
    groups = [{"params": [one], "weight_decay": 0.5, "lr": 0.1}, {"params": [two], "lr": 0.0}]
    MeZOOptimizer(groups).step(lambda: torch.tensor(3.0))  # flat: no slope
    torch.testing.assert_close(one.detach(), torch.full((5,), 1 - 0.5 * 0.1))
    assert torch.equal(two.detach(), torch.ones(5))


def test_a_direction_with_a_slope_that_is_not_finite_is_skipped() -> None:
    weight = nn.Parameter(torch.ones(5))
    for loss in (float("nan"), float("inf")):
        optimizer = MeZOOptimizer([weight], lr=0.1)
        optimizer.step(partial(torch.tensor, loss))
        assert torch.equal(weight.detach(), torch.ones(5))
        assert optimizer.param_groups[0]["step"] == optimizer.num_skipped_directions == 1


def test_a_skipped_direction_counts_in_the_mean() -> None:
    """The other directions move the weight as far as they would without it."""
    weight = nn.Parameter(torch.zeros(5))
    optimizer = MeZOOptimizer([weight], lr=1.0, directions=2)
    z = z_of(optimizer, weight, direction=1)
    optimizer.apply_slopes([float("nan"), 3.0])
    torch.testing.assert_close(weight.detach(), -3.0 * z / 2)


@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
def test_training_resumes_from_the_state_dict(rounding: Any) -> None:
    """Equal to the bit, also in bf16, where a rounding residual is part of the state."""

    def loss() -> Tensor:
        found: Tensor = linear(x).float().square().mean()
        return found

    ends = []
    for stop in (None, 3):
        torch.manual_seed(0)
        linear, x = nn.Linear(16, 8).bfloat16(), torch.randn(4, 16).bfloat16()
        optimizer = MeZOOptimizer(linear.named_parameters(), lr=1e-2, rounding=rounding)
        for step in range(6):
            if step == stop:
                saved = copy.deepcopy(optimizer.state_dict())
                linear = copy.deepcopy(linear)
                optimizer = MeZOOptimizer(linear.named_parameters(), lr=0.5, seed=9, rounding=rounding)
                optimizer.load_state_dict(saved)
            optimizer.step(loss)
        ends.append(linear.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("version", [None, VERSION - 1])
def test_a_state_of_other_noise_is_refused(version: int | None) -> None:
    """Its next steps would have other directions, and its trajectory would lead elsewhere."""
    optimizer = MeZOOptimizer([nn.Parameter(torch.ones(3))], lr=0.1)
    state = optimizer.state_dict()
    del state["noise_version"]
    if version is not None:
        state["noise_version"] = version
    with pytest.raises(UserError, match=rf"version {version or '1 or 2'}.* --model\.weights"):
        optimizer.load_state_dict(state)
    assert optimizer.seed == 0


def test_a_later_parameter_group_is_refused() -> None:
    optimizer = MeZOOptimizer([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(UserError, match=r"add_param_group: .* Give all groups to its constructor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def test_a_state_without_the_residuals_of_some_weights_is_continued() -> None:
    """Theirs are zeros, as those of weights in fp32 that are in half precision now."""
    weights = [(name, nn.Parameter(torch.ones(8).bfloat16())) for name in "ab"]
    optimizer = MeZOOptimizer(weights, lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: {"rounding_residual": torch.full((8,), 1e-3)}}})
    optimizer.apply_slopes([0.0])
    residuals = [optimizer.state[weight]["rounding_residual"] for _, weight in weights]
    torch.testing.assert_close(torch.stack(residuals), torch.tensor([[1e-3], [0.0]]).bfloat16().expand(2, 8))


def test_a_history_that_a_caller_keeps_does_not_grow() -> None:
    optimizer = MeZOOptimizer([nn.Parameter(torch.ones(3))], lr=0.5)
    optimizer.apply_slopes([1.0])
    kept = np.asarray(optimizer.history)
    optimizer.apply_slopes([2.0])
    assert kept.tolist() == [0.5, 1.0]
    assert optimizer.history.tolist() == [0.5, 1.0, 0.5, 2.0]


@pytest.mark.parametrize("share", [1.0, 0.99])
def test_units_have_names_of_their_own(share: float) -> None:
    """Also those of weights without a name: equal names would have equal noise."""
    table, block, last = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    weights, readers = nn.ModuleList([table, block, last]).parameters(), [(table, table.get_parameter("weight"))]
    optimizer = MeZOOptimizer(weights, share=share, blocks=[block], table_readers=readers)
    names = [unit.name for unit in optimizer.layout.units]
    assert len(set(names)) == len(names) == (3 if share == 1 else 4)


@noises
def test_units_directions_and_steps_have_noise_of_their_own(noise: Any) -> None:
    """Weights of one shape are uncorrelated, also those of a unit and those without a name."""
    table, linears = nn.Embedding(50, 50), [nn.Linear(50, 50, bias=False) for _ in range(4)]
    weights, readers = nn.ModuleList([table, *linears]).parameters(), [(table, table.get_parameter("weight"))]
    blocks = [nn.Sequential(*linears[:2]), linears[2]]
    optimizer = MeZOOptimizer(weights, noise=noise, directions=2, share=0.99, blocks=blocks, table_readers=readers)
    z = [*optimizer.sample(0).values(), *optimizer.sample(1).values()]
    optimizer.param_groups[0]["step"] = 1
    z += optimizer.sample(0).values()
    correlations = torch.corrcoef(torch.stack([values.flatten() for values in z])) - torch.eye(15)
    assert float(correlations.abs().max()) < 6 / 2500**0.5


@noises
def test_a_step_takes_the_memory_of_the_largest_unit(noise: Any) -> None:
    """Once more, beside inference: also where a part of the noise is as large as a unit."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    x = torch.randn(4, 512)
    optimizer = MeZOOptimizer(model.named_parameters(), noise=noise, blocks=list(model))
    weights = sum(p.numel() * 4 for p in model.parameters())
    for _ in range(3):
        with LiveBytes(model) as live:
            optimizer.step(lambda: model(x).square().mean())
        extra = 2 if noise == "rademacher" else 1
        assert live.peak_bytes - weights < extra * 513 * 512 * 4 + 2**20


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"directions": 0}, {"share": 0.0}, {"share": 1.5}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"epsilon=.* must be above 0, directions=.* at least 1, and share=.* at most"):
        MeZOOptimizer([nn.Parameter(torch.ones(1))], **wrong)


class Words(nn.Module):
    """Model with an embedding that is also the output layer, as in a language model."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(40, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.select_rows = SelectRows()
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        readers = [(module, self.embedding.weight) for module in (self.embedding, self.select_rows)]
        self.parts: dict[str, Any] = {"blocks": [self.middle], "table_readers": readers}

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.middle(self.embedding(ids).mean(1))
        logits: Tensor = hidden @ self.select_rows(torch.tensor([1, 2]), self.embedding.weight).T
        return logits

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids).float(), torch.arange(len(ids)) % 2)


@noises
@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unread_rows_stay_and_read_rows_are_updated(noise: Any, dtype: torch.dtype, rounding: Any) -> None:
    ids, ends = torch.tensor([[3, 5, 5], [7, 3, 30]]), {}
    for rows in ("all", "seen"):
        model = Words(dtype)
        settings: dict[str, Any] = {"noise": noise, "rows": rows, "rounding": rounding} | model.parts
        optimizer = MeZOOptimizer(model.named_parameters(), lr=0.1, weight_decay=0.1, **settings)
        for _ in range(3):
            optimizer.step(lambda: model.loss(ids))  # noqa: B023
        ends[rows] = model.state_dict()
    read = torch.tensor([1, 2, 3, 5, 7, 30])
    before = Words(dtype).embedding.weight
    name = "embedding.weight"
    assert torch.equal(ends["seen"][name][read], ends["all"][name][read])
    assert torch.equal(ends["seen"]["middle.weight"], ends["all"]["middle.weight"])
    moved = (ends["seen"][name] != before).any(1).nonzero().flatten()
    assert torch.equal(moved, read)


def test_normalize_divides_slopes_by_the_deviation_of_the_losses() -> None:
    """The scale of the loss does not change the step, which is the plain one over the deviation."""
    weight, loss = bowl()
    plain, scaled, other = (
        moved(MeZOOptimizer([weight], lr=0.1, directions=4, normalize=on), weight, lambda: unit * loss())  # noqa: B023
        for on, unit in ((False, 1.0), (True, 1.0), (True, 100.0))
    )
    torch.testing.assert_close(other, scaled, rtol=1e-5, atol=1e-9)
    optimizer = MeZOOptimizer([weight], lr=0.0, directions=4)
    with torch.no_grad():
        losses = optimizer._evaluate(loss, 1, lambda name, function, generators: function())
    torch.testing.assert_close(scaled * losses.std(), plain, rtol=1e-5, atol=1e-9)


def test_every_step_draws_its_share_of_the_weights() -> None:
    """The other weights stay, and over many steps every weight takes part."""
    weights = [(f"w{i}", nn.Parameter(torch.ones(3))) for i in range(40)]
    optimizer, parts = MeZOOptimizer(weights, lr=0.1, share=0.25, weight_decay=0.1), []
    for _ in range(50):
        before = [w.detach().clone() for _, w in weights]
        optimizer.step(lambda: torch.stack([w.sum() for _, w in weights]).sum())
        parts.append([not torch.equal(w, b) for (_, w), b in zip(weights, before, strict=True)])
    taken = torch.tensor(parts).float()
    assert float(taken.mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))
    assert taken.any(0).all()
    assert len({tuple(part) for part in parts}) > 40


def test_blocks_are_drawn_as_a_whole() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    optimizer = MeZOOptimizer(model.named_parameters(), lr=0.1, share=0.5, blocks=list(model))
    before = copy.deepcopy(model)
    optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    moved = [not torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters()]
    assert moved[::2] == moved[1::2]  # a block's weight and its bias
    assert 0 < sum(moved) < 16


def test_ranks_with_their_own_directions_equal_one_rank_with_all() -> None:
    """Four ranks of one direction equal one rank of four, to the bit: each fills its rows of the sums."""
    ends, sent = [], []
    for rank in range(4):  # the tensor that each rank would send
        weight, loss = bowl()
        optimizer = MeZOOptimizer([weight], lr=0.1, shard=(rank, 4), reduce=lambda sums: sent.append(sums) or sums)  # type: ignore[func-returns-value]
        optimizer.step(loss, num_examples=8)
    total = torch.stack(sent).sum(0)
    for settings in ({"directions": 4}, {"shard": (2, 4), "reduce": lambda _: total}):
        weight, loss = bowl()
        MeZOOptimizer([weight], lr=0.1, **settings).step(loss, num_examples=8)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_ranks_count_by_their_number_of_examples() -> None:
    """A rank with 8 examples and one with 2 make the step of one rank with the mean loss of all 10."""
    weight, loss = bowl()
    sent: list[Tensor] = []
    first = MeZOOptimizer([weight], lr=0.1, reduce=lambda sums: sent.append(sums) or sums)  # type: ignore[func-returns-value]
    moved(first, weight, lambda: 5 * loss(), num_examples=8)
    second = MeZOOptimizer([weight], lr=0.1, reduce=lambda sums: sums + sent[0])
    both = moved(second, weight, lambda: 3 * loss(), num_examples=2)
    one = moved(MeZOOptimizer([weight], lr=0.1), weight, lambda: 4.6 * loss(), num_examples=10)
    torch.testing.assert_close(both, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"directions": 3},
        {"share": 0.5, "rounding": "residual"},
        {"normalize": True, "directions": 2, "noise": "low_rank"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_equal_the_recorded_ones(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Replay the whole history, or a part followed by ordinary steps."""
    ids = torch.randint(40, (6, 5), generator=torch.Generator().manual_seed(2))

    def run(steps: int, replay_rows: list[list[float]]) -> tuple[dict[str, Tensor], list[list[float]]]:
        model = Words(dtype)
        by_size = [[(n, p) for n, p in model.named_parameters() if (p.dim() > 1) is big] for big in (True, False)]
        optimizer = MeZOOptimizer(
            [{"params": by_size[0], "weight_decay": 0.1}, {"params": by_size[1]}], lr=0.01, **settings | model.parts
        )
        optimizer.replay_rows = replay_rows
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            evaluates = step >= len(replay_rows)
            optimizer.step(lambda: model.loss(ids) if evaluates else pytest.fail("evaluated the loss"))  # noqa: B023
        width = 2 + optimizer.directions
        assert len(optimizer.history) == steps * width
        flat = optimizer.history.tolist()
        return model.state_dict(), [flat[i : i + width] for i in range(0, len(flat), width)]

    whole, rows = run(6, [])
    for num_replayed in (6, 4):
        again, same = run(6, rows[:num_replayed])
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
        assert str(same) == str(rows)  # as text, because a deviation of zero makes NaN
