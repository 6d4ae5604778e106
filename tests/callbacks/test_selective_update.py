"""Policies against plain training and against what they say: what is left out is not run, and moves by nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_spu import registry
from lit_spu.__main__ import main
from lit_spu.callbacks.latency import Latency
from lit_spu.callbacks.policies import (
    Always,
    DropBackward,
    GradNorm,
    LayerCyclic,
    LossEMA,
    Never,
    Policy,
    Random,
    TeacherDistance,
)
from lit_spu.callbacks.selective_update import SelectiveUpdate
from lit_spu.errors import UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.base import Method
from lit_spu.nn.bypass import bypassed
from tests import runs
from tests.conftest import encode
from tests.runs import StopBehind, same, weights

Tiny = Callable[[str], str]

fit = partial(runs.fit, max_epochs=3)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Watch(Callback):
    """After every step: which weights moved, what has been counted, and what the forward pass stored."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.whole: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.moved.append({n for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])})
        self.whole.append(bool(trainer.callback_metrics["update/whole"]))


def made(config: str, backbone: str, **settings: Any) -> Method:
    return runs.made(config, backbone, **{"weight_decay": 0.1, **settings})


def trained(method: Method) -> set[str]:
    return {name for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "policy",
    [Always(), Random(rate=0.0), DropBackward(rate=0.0), LayerCyclic(blocks=4)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("config", ["full", "lora"])
def test_what_leaves_out_nothing_is_plain_training_to_the_bit(
    tiny: Tiny, tmp_path: Path, config: str, policy: Policy
) -> None:
    plain, ours = made(config, tiny("bert")), made(config, tiny("bert"))
    fit(plain, tmp_path)
    fit(ours, tmp_path, SelectiveUpdate(policy))
    assert same(weights(plain), weights(ours))


def test_never_runs_no_pass_and_moves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    method, latency, callback = made("full", tiny("bert")), Latency(warmup=0), SelectiveUpdate(Never())
    before = weights(method)
    trainer = fit(method, tmp_path, latency, callback)
    assert same(before, weights(method))
    assert not {"passes/forward", "passes/backward"} & set(latency.summary)
    assert callback.summary == {"update/skipped": 12, "update/steps": 12}
    assert trainer.global_step == 12


@pytest.mark.parametrize("config", ["full", "lora", "ia3", "lst", "head"])
def test_chance_leaves_out_whole_steps(tiny: Tiny, tmp_path: Path, config: str) -> None:
    method, latency, watch = made(config, tiny("bert")), Latency(warmup=0), Watch()
    callback = SelectiveUpdate(Random(rate=0.5))
    fit(method, tmp_path, latency, callback, watch)
    assert watch.whole == [Random(rate=0.5).before_forward(step, {}) for step in range(12)]
    assert [bool(names) for names in watch.moved] == watch.whole
    assert latency.summary["passes/forward"] == latency.summary["passes/backward"] == sum(watch.whole)
    assert callback.num_skipped == 12 - sum(watch.whole)


def test_chance_has_its_rate() -> None:
    for rate in (0.1, 0.5, 0.9):
        left_out = sum(not Random(rate).before_forward(step, {}) for step in range(10_000))
        assert left_out / 10_000 == pytest.approx(rate, abs=0.02)
        passed = sum(len(DropBackward(rate).bypassed_blocks(step, 10)) for step in range(1000))
        assert passed / 10_000 == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_the_biases_alone_learn_above_a_depth(tiny: Tiny, tmp_path: Path, family: str) -> None:
    method, watch = made("full", tiny(family)), Watch()
    below = {id(p) for stage in method.parameters_by_depth[:3] for p in stage}  # the embeddings, and blocks 0 and 1
    biases = {n for n, p in method.named_parameters() if n.endswith("bias") and id(p) not in below}
    if not biases:
        pytest.skip("a family without biases")
    fit(method, tmp_path, SelectiveUpdate(Random(rate=0.5), otherwise="biases", depth=2), watch)
    assert False in watch.whole
    for whole, moved in zip(watch.whole, watch.moved, strict=True):
        if whole:
            assert moved - biases
        else:
            assert moved
            assert moved <= biases
    assert trained(method) == trained(made("full", tiny(family)))


def stored(method: Method, callback: SelectiveUpdate, folder: Path) -> list[int]:
    """Bytes that each step's forward pass stores."""
    found: list[int] = []
    loss = method.loss

    def counted(batch: Any) -> Tensor:
        with SavedForBackward() as saved:
            result = loss(batch)
        found.append(saved.nbytes)
        return result

    method.loss = counted  # type: ignore[method-assign]
    fit(method, folder, callback, max_epochs=1, limit_train_batches=1)
    return found


def test_less_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    """By biases alone, the less the higher they begin; and by blocks that are gone around."""
    (whole,) = stored(made("full", tiny("bert")), SelectiveUpdate(Always()), tmp_path)
    depths = [
        stored(made("full", tiny("bert")), SelectiveUpdate(Never(), otherwise="biases", depth=d), tmp_path)[0]
        for d in (0, 2, 3)
    ]
    assert whole > depths[0] > depths[1] > depths[2]
    around = [
        stored(made("full", tiny("bert")), SelectiveUpdate(LayerCyclic(blocks=n)), tmp_path)[0] for n in (4, 3, 2, 1)
    ]
    assert around[0] == whole
    assert around[0] > around[1] > around[2] > around[3]


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "gpt2", "llama"])
@pytest.mark.parametrize("config", ["full", "lora"])
def test_blocks_learn_in_turn(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    method, watch = made(config, tiny(family)), Watch()
    depth = len(method.backbone.base_model.stacks[0])
    names = {id(p): name for name, p in method.named_parameters()}
    stages = [{names[id(p)] for p in stage if p.requires_grad} for stage in method.parameters_by_depth[1 : depth + 1]]
    shared = set.union(*stages) - {n for s in stages for n in s if sum(n in other for other in stages) == 1}
    fit(method, tmp_path, SelectiveUpdate(LayerCyclic(blocks=1)), watch, max_epochs=1)
    for step, moved in enumerate(watch.moved):
        assert {i for i, stage in enumerate(stages) if moved & (stage - shared)} == {step % depth}


@pytest.mark.parametrize(
    ("policy", "settings"),
    [(Random(0.5), {"otherwise": "biases", "depth": 1}), (LayerCyclic(blocks=2), {}), (DropBackward(0.5), {})],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(("config", "family"), [("full", "bert"), ("full", "t5"), ("lora", "bert")])
def test_recomputing_changes_nothing(
    tiny: Tiny, tmp_path: Path, config: str, family: str, policy: Policy, settings: dict[str, Any]
) -> None:
    kept, recomputed = (made(config, tiny(family), gradient_checkpointing=on) for on in (False, True))
    for method in (kept, recomputed):
        fit(method, tmp_path, SelectiveUpdate(policy, **settings))
    for one, other in zip(weights(kept), weights(recomputed), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_in_which_nothing_is_left_to_learn_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    method = made("lora", tiny("bert"), head="prompt")  # whose head is frozen
    callback, watch = SelectiveUpdate(DropBackward(rate=0.8)), Watch()
    fit(method, tmp_path, callback, watch)
    none = [len(callback.policy.bypassed_blocks(step, 4)) == 4 for step in range(12)]
    assert 0 < sum(none) < 12
    assert [not moved for moved in watch.moved] == none


def test_the_scores_are_those_of_the_whole_model(tiny: Tiny) -> None:
    """What goes around a block is its gradient alone; the gradient goes to what is below it as it comes."""
    method = made("full", tiny("bert")).eval()
    batch, block = encode(method.backbone), method.backbone.blocks[2]
    entered: list[Tensor] = []
    left: list[Tensor] = []
    plain = method(batch)
    handles = (
        method.backbone.blocks[1].register_forward_hook(lambda _m, _i, out: entered.append(out)),
        method.backbone.blocks[3].register_forward_pre_hook(lambda _m, args: left.append(args[0])),
    )
    with bypassed(block):
        around = method(batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, around)
    gradients = torch.autograd.grad(around.logsumexp(-1).sum(), [entered[0], left[0]])
    assert torch.equal(*gradients)


class Log(Callback):
    """What a policy that looks at losses, gradients or a teacher ought to know, computed apart."""

    def __init__(self) -> None:
        self.numbers: list[list[int]] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        with torch.no_grad():
            scores = torch.nn.Module.__call__(pl_module.backbone, batch)
        self.numbers.append(batch["index"].tolist())
        self.losses.append(torch.nn.functional.cross_entropy(scores, batch["labels"], reduction="none"))


def test_batches_whose_examples_had_low_losses_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    method, log, watch = made("full", tiny("bert")), Log(), Watch()
    fit(method, tmp_path, log, SelectiveUpdate(LossEMA(rate=0.5, decay=0.25)), watch, max_epochs=4)
    shown: dict[int, float] = {}
    recent: list[float] = []
    for numbers, losses, whole in zip(log.numbers, log.losses, watch.whole, strict=True):
        expected = True
        if all(number in shown for number in numbers):
            value = sum(shown[number] for number in numbers) / len(numbers)
            if recent:
                expected = value >= float(torch.tensor(recent, dtype=torch.float64).quantile(0.5))
            recent.append(value)
        assert whole == expected
        if whole:
            for number, loss in zip(numbers, losses.tolist(), strict=True):
                shown[number] = 0.25 * shown.get(number, loss) + 0.75 * loss
    assert watch.whole[:4] == [True] * 4
    assert False in watch.whole


def test_batches_that_came_with_small_gradients_are_left_out() -> None:
    policy = GradNorm(rate=0.5, decay=0.0)
    small, large = ({"index": torch.tensor(numbers)} for numbers in ([0, 1], [2, 3]))
    assert policy.before_forward(0, small)
    policy.after_step(1.0, small)
    policy.after_step(3.0, large)
    mixed = {"index": torch.tensor([0, 2])}
    assert policy.before_forward(2, mixed)  # the first value that is known is no lower than any
    assert not policy.before_forward(3, small)
    assert policy.before_forward(4, large)
    assert policy.before_forward(5, {"index": torch.tensor([0, 9])})  # one of which nothing is known


def test_where_student_and_teacher_agree_there_is_no_backward_pass(tiny: Tiny, tmp_path: Path) -> None:
    method, latency, watch = made("full", tiny("bert")), Latency(warmup=0), Watch()
    callback = SelectiveUpdate(TeacherDistance("mini-t5", rate=0.5))
    fit(method, tmp_path, latency, callback, watch)
    assert latency.summary["passes/forward"] == 12  # decided behind it
    assert latency.summary["passes/backward"] == sum(watch.whole) < 12
    assert [bool(names) for names in watch.moved] == watch.whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelectiveUpdate(Random(rate=0.5)),
        lambda: SelectiveUpdate(LossEMA(rate=0.5)),
        lambda: SelectiveUpdate(GradNorm(rate=0.5), otherwise="biases"),
        lambda: SelectiveUpdate(DropBackward(rate=0.5)),
        lambda: SelectiveUpdate(TeacherDistance("mini-t5")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: Tiny, tmp_path: Path, make: Callable[[], SelectiveUpdate]
) -> None:
    whole, callback = made("full", tiny("bert")), make()
    fit(whole, tmp_path, callback, max_epochs=4)
    fit(made("full", tiny("bert")), tmp_path, make(), StopBehind(1), max_epochs=4).save_checkpoint(
        tmp_path / "half.ckpt"
    )
    rest, again = made("full", tiny("bert")), make()
    fit(rest, tmp_path, again, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(rest))
    assert callback.summary == again.summary


def test_all_is_as_it_was_behind_a_run(tiny: Tiny, tmp_path: Path) -> None:
    method = made("full", tiny("bert"))
    fit(method, tmp_path, SelectiveUpdate(Random()))
    assert "training_step" not in vars(method)
    assert not method._forward_hooks


@pytest.mark.parametrize(
    ("config", "callback", "said"),
    [
        ("mezo", lambda: SelectiveUpdate(Random()), "takes its steps by itself"),
        ("lst", lambda: SelectiveUpdate(LayerCyclic()), "trains nothing in the backbone's blocks"),
        ("head", lambda: SelectiveUpdate(Random(), otherwise="biases"), "trains nothing in the backbone's blocks"),
        ("full", lambda: SelectiveUpdate(Random(), otherwise="biases", depth=4), "the backbone has 4 blocks"),
        ("full", lambda: SelectiveUpdate(TeacherDistance("nowhere")), "model.teacher"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny: Tiny, tmp_path: Path, config: str, callback: Callable[[], SelectiveUpdate], said: str
) -> None:
    method = made(config, tiny("bert"))
    before = weights(method)
    with pytest.raises(UserError, match=said):
        fit(method, tmp_path, callback())
    assert same(before, weights(method))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Random(rate=1.0), "rate=1.0"),
        (lambda: LayerCyclic(blocks=0), "blocks=0"),
        (lambda: LossEMA(decay=1.0), "decay=1.0"),
        (lambda: SelectiveUpdate(Always(), depth=-1), "depth=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong()


def test_a_policy_is_one_by_being_there() -> None:
    found = {cls.__name__ for cls in registry.classes("lit_spu.callbacks.policies") if issubclass(cls, Policy)}
    assert found >= {
        "Always",
        "Never",
        "Random",
        "LayerCyclic",
        "DropBackward",
        "LossEMA",
        "GradNorm",
        "TeacherDistance",
    }


def test_it_is_a_flag(tmp_path: Path) -> None:
    small = [
        "--data.limit_train=64",
        "--data.limit_validation=50",
        "--trainer.max_epochs=1",
        f"--data.cache={tmp_path}",
    ]
    flags = [
        "--trainer.callbacks+=SelectiveUpdate",
        "--trainer.callbacks.policy=Random",
        "--trainer.callbacks.policy.rate=0.9",
    ]
    main(["fit", "--config=configs/full.yaml", *flags, *small, f"--run_dir={tmp_path}/run"])
    assert "update/skipped" in (tmp_path / "run" / "summary.json").read_text()
