"""Selective updates: what a policy skips is not run, does not change, and is counted."""

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
from lit_spu.nn.bypass import bypass_backward
from tests import runs
from tests.conftest import encode
from tests.ddp import quiet_trainer
from tests.runs import StopBehind, same, weights

Tiny = Callable[[str], str]

fit = partial(runs.fit, max_epochs=3)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Watch(Callback):
    """Records after every step which weights changed, and whether it was a full step."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.full: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.changed.append({n for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])})
        self.full.append(bool(trainer.callback_metrics["update/whole"]))


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
def test_a_policy_that_skips_nothing_is_plain_training_bit_for_bit(
    tiny: Tiny, tmp_path: Path, config: str, policy: Policy
) -> None:
    plain, ours = made(config, tiny("bert")), made(config, tiny("bert"))
    fit(plain, tmp_path)
    fit(ours, tmp_path, SelectiveUpdate(policy))
    assert same(weights(plain), weights(ours))


def test_never_runs_no_pass_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    method, latency, callback = made("full", tiny("bert")), Latency(warmup=0), SelectiveUpdate(Never())
    before = weights(method)
    trainer = fit(method, tmp_path, latency, callback)
    assert same(before, weights(method))
    assert not {"passes/forward", "passes/backward"} & set(latency.summary)
    assert callback.summary == {"update/skipped": 12, "update/steps": 12}
    assert trainer.global_step == 12


@pytest.mark.parametrize("config", ["full", "lora", "ia3", "lst", "head"])
def test_random_skips_steps(tiny: Tiny, tmp_path: Path, config: str) -> None:
    method, latency, watch = made(config, tiny("bert")), Latency(warmup=0), Watch()
    callback = SelectiveUpdate(Random(rate=0.5))
    fit(method, tmp_path, latency, callback, watch)
    assert watch.full == [Random(rate=0.5).before_forward(step, {}) for step in range(12)]
    assert [bool(names) for names in watch.changed] == watch.full
    assert latency.summary["passes/forward"] == latency.summary["passes/backward"] == sum(watch.full)
    assert callback.num_skipped == 12 - sum(watch.full)


def test_random_policies_skip_at_their_rate() -> None:
    for rate in (0.1, 0.5, 0.9):
        num_skipped = sum(not Random(rate).before_forward(step, {}) for step in range(10_000))
        assert num_skipped / 10_000 == pytest.approx(rate, abs=0.02)
        num_bypassed = sum(len(DropBackward(rate).bypassed_blocks(step, 10)) for step in range(1000))
        assert num_bypassed / 10_000 == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_otherwise_biases_trains_only_the_biases_above_depth(tiny: Tiny, tmp_path: Path, family: str) -> None:
    method, watch = made("full", tiny(family)), Watch()
    below = {id(p) for layer in method.parameters_by_depth[:3] for p in layer}  # the embeddings, and blocks 0 and 1
    biases = {n for n, p in method.named_parameters() if n.endswith("bias") and id(p) not in below}
    if not biases:
        pytest.skip("a family without biases")
    fit(method, tmp_path, SelectiveUpdate(Random(rate=0.5), otherwise="biases", depth=2), watch)
    assert False in watch.full
    for is_full, changed in zip(watch.full, watch.changed, strict=True):
        if is_full:
            assert changed - biases
        else:
            assert changed
            assert changed <= biases
    assert trained(method) == trained(made("full", tiny(family)))


def stored_bytes(method: Method, callback: SelectiveUpdate, folder: Path) -> int:
    """Return the bytes that the forward pass of one step stores."""
    found: list[int] = []
    loss = method.loss

    def counted(batch: Any) -> Tensor:
        with SavedForBackward() as saved:
            result = loss(batch)
        found.append(saved.nbytes)
        return result

    method.loss = counted  # type: ignore[method-assign]
    fit(method, folder, callback, max_epochs=1, limit_train_batches=1)
    (nbytes,) = found
    return nbytes


def test_partial_updates_store_less(tiny: Tiny, tmp_path: Path) -> None:
    """Biases alone store less, the higher `depth` is; blocks store less, the more of them are bypassed."""

    def stored(callback: SelectiveUpdate) -> int:
        return stored_bytes(made("full", tiny("bert")), callback, tmp_path)

    full = stored(SelectiveUpdate(Always()))
    biases = [stored(SelectiveUpdate(Never(), otherwise="biases", depth=depth)) for depth in (0, 2, 3)]
    assert full > biases[0] > biases[1] > biases[2]
    blocks = [stored(SelectiveUpdate(LayerCyclic(blocks=num_blocks))) for num_blocks in (4, 3, 2, 1)]
    assert blocks[0] == full
    assert blocks[0] > blocks[1] > blocks[2] > blocks[3]


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "gpt2", "llama"])
@pytest.mark.parametrize("config", ["full", "lora"])
def test_layer_cyclic_trains_blocks_in_turn(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    method, watch = made(config, tiny(family)), Watch()
    depth = method.backbone.stacks[0].depth
    names = {id(p): name for name, p in method.named_parameters()}
    blocks = [{names[id(p)] for p in block if p.requires_grad} for block in method.parameters_by_depth[1 : depth + 1]]
    shared = set.union(*blocks) - {n for b in blocks for n in b if sum(n in other for other in blocks) == 1}
    trainer = fit(method, tmp_path, SelectiveUpdate(LayerCyclic(blocks=1)), watch, max_epochs=1)
    assert trainer.callback_metrics["update/blocks"] == 1
    for step, changed in enumerate(watch.changed):
        assert {i for i, block in enumerate(blocks) if changed & (block - shared)} == {step % depth}


@pytest.mark.parametrize(
    ("policy", "settings"),
    [(Random(0.5), {"otherwise": "biases", "depth": 1}), (LayerCyclic(blocks=2), {}), (DropBackward(0.5), {})],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(("config", "family"), [("full", "bert"), ("full", "t5"), ("lora", "bert")])
def test_gradient_checkpointing_changes_nothing(
    tiny: Tiny, tmp_path: Path, config: str, family: str, policy: Policy, settings: dict[str, Any]
) -> None:
    stored, recomputed = (made(config, tiny(family), gradient_checkpointing=on) for on in (False, True))
    for method in (stored, recomputed):
        fit(method, tmp_path, SelectiveUpdate(policy, **settings))
    for one, other in zip(weights(stored), weights(recomputed), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_is_skipped_if_all_that_trains_is_bypassed(tiny: Tiny, tmp_path: Path) -> None:
    method = made("lora", tiny("bert"), head="prompt")  # this head is frozen
    callback, watch = SelectiveUpdate(DropBackward(rate=0.8)), Watch()
    fit(method, tmp_path, callback, watch)
    all_bypassed = [len(callback.policy.bypassed_blocks(step, 4)) == 4 for step in range(12)]
    assert 0 < sum(all_bypassed) < 12
    assert [not changed for changed in watch.changed] == all_bypassed


def test_bypassing_a_block_changes_only_gradients(tiny: Tiny) -> None:
    """The logits stay the same, and the gradient passes to the block below unchanged."""
    method = made("full", tiny("bert")).eval()
    batch, block = encode(method.backbone), method.backbone.blocks[2]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    plain = method(batch)
    handles = (
        method.backbone.blocks[1].register_forward_hook(lambda _module, _args, out: inputs.append(out)),
        method.backbone.blocks[3].register_forward_pre_hook(lambda _module, args: outputs.append(args[0])),
    )
    with bypass_backward(block):
        logits = method(batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, logits)
    gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), [inputs[0], outputs[0]])
    assert torch.equal(*gradients)


class Log(Callback):
    """Records the examples of each batch and their losses, computed separately."""

    def __init__(self) -> None:
        self.numbers: list[list[int]] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        with torch.no_grad():
            logits = torch.nn.Module.__call__(pl_module.backbone, batch)
        self.numbers.append(batch["index"].tolist())
        self.losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))


def test_loss_ema_skips_batches_with_low_losses(tiny: Tiny, tmp_path: Path) -> None:
    method, log, watch = made("full", tiny("bert")), Log(), Watch()
    fit(method, tmp_path, log, SelectiveUpdate(LossEMA(rate=0.5, decay=0.25)), watch, max_epochs=4)
    averages: dict[int, float] = {}
    recent: list[float] = []
    for numbers, losses, is_full in zip(log.numbers, log.losses, watch.full, strict=True):
        expected = True
        if all(number in averages for number in numbers):
            value = sum(averages[number] for number in numbers) / len(numbers)
            if recent:
                expected = value >= float(torch.tensor(recent, dtype=torch.float64).quantile(0.5))
            recent.append(value)
        assert is_full == expected
        if is_full:
            for number, loss in zip(numbers, losses.tolist(), strict=True):
                averages[number] = 0.25 * averages.get(number, loss) + 0.75 * loss
    assert watch.full[:4] == [True] * 4
    assert False in watch.full


def regression_batch(losses: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and a batch whose examples have these losses."""
    logits = torch.tensor(losses).sqrt().unsqueeze(1)
    return logits, {"index": torch.arange(len(losses)), "labels": torch.zeros(len(losses))}


def test_loss_ema_averages_the_losses_of_an_example() -> None:
    policy = LossEMA(decay=0.25)
    for losses in ([1.0, 8.0], [5.0, 4.0]):
        policy.after_forward(*regression_batch(losses))
    assert policy.averages == pytest.approx({0: 0.25 * 1 + 0.75 * 5, 1: 0.25 * 8 + 0.75 * 4})


def test_grad_norm_weighs_recent_norms_by_its_decay() -> None:
    """With decay 1/4 the norms 1 and 3 average to 2.5, which is above 2; with 3/4 they would average to 1.5."""
    policy = GradNorm(rate=0.5, decay=0.25)
    rising, constant = ({"index": torch.tensor([number])} for number in (0, 1))
    for norm in (1.0, 3.0):
        policy.after_step(norm, rising)
    policy.after_step(2.0, constant)
    assert policy.before_forward(0, constant)  # its value, 2, is now the only recent one
    assert policy.before_forward(1, rising)


def test_grad_norm_skips_batches_with_small_gradients() -> None:
    policy = GradNorm(rate=0.5, decay=0.0)
    small, large = ({"index": torch.tensor(numbers)} for numbers in ([0, 1], [2, 3]))
    assert policy.before_forward(0, small)
    policy.after_step(1.0, small)
    policy.after_step(3.0, large)
    mixed = {"index": torch.tensor([0, 2])}
    assert policy.before_forward(2, mixed)  # the first known value is below no other
    assert not policy.before_forward(3, small)
    assert policy.before_forward(4, large)
    assert policy.before_forward(5, {"index": torch.tensor([0, 9])})  # one example has no average yet


def test_teacher_distance_skips_backward_passes(tiny: Tiny, tmp_path: Path) -> None:
    method, latency, watch = made("full", tiny("bert")), Latency(warmup=0), Watch()
    callback = SelectiveUpdate(TeacherDistance("mini-t5", rate=0.5))
    fit(method, tmp_path, latency, callback, watch)
    assert latency.summary["passes/forward"] == 12  # the decision comes after it
    assert latency.summary["passes/backward"] == sum(watch.full) < 12
    assert [bool(names) for names in watch.changed] == watch.full


def test_teacher_distance_skips_the_batches_close_to_the_teacher() -> None:
    policy, batch = TeacherDistance("unused", rate=0.5), {"index": torch.tensor([0])}
    policy.teacher_logits = torch.tensor([[2.0, 0.0]])
    far, near = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.9, 0.0]])
    assert [policy.after_forward(logits, batch) for logits in (far, near, far)] == [True, False, True]


def test_a_low_value_is_low_among_the_last_values_only() -> None:
    policy = TeacherDistance("unused", rate=0.5, window=2)
    assert not any(policy.is_low(value) for value in (1.0, 10.0, 10.0, 20.0))
    assert [policy.is_low(value) for value in (1.0, 1.0, 5.0)] == [True, True, False]


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
def test_a_resumed_run_equals_the_uninterrupted_one(
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


def test_no_hook_remains_after_training(tiny: Tiny, tmp_path: Path) -> None:
    method = made("full", tiny("bert"))
    fit(method, tmp_path, SelectiveUpdate(Random()))
    assert method.step_wrapper is None
    assert not method._forward_hooks


class LayerCyclicBiases(LayerCyclic):
    """Trains only the biases of a few blocks in each step."""

    def before_forward(self, step: int, batch: Any) -> bool:
        return False


def test_a_failing_run_restores_the_method(tiny: Tiny, tmp_path: Path) -> None:
    method = made("full", tiny("bert"))
    before, blocks = trained(method), list(method.backbone.blocks)
    forwards = [block.forward for block in blocks]

    def fail(batch: Any) -> Tensor:
        raise RuntimeError("step failed")

    method.loss = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="step failed"):
        fit(method, tmp_path, SelectiveUpdate(LayerCyclicBiases(), otherwise="biases"))
    assert trained(method) == before
    assert [block.forward for block in blocks] == forwards
    assert method.step_wrapper is None
    assert not method._forward_hooks


@pytest.mark.parametrize(
    ("config", "callback", "message"),
    [
        ("mezo", lambda: SelectiveUpdate(Random()), "takes its steps by itself"),
        ("lst", lambda: SelectiveUpdate(LayerCyclic()), "trains nothing in the backbone's blocks"),
        ("head", lambda: SelectiveUpdate(Random(), otherwise="biases"), "trains nothing in the backbone's blocks"),
        ("full", lambda: SelectiveUpdate(Random(), otherwise="biases", depth=4), "the backbone has 4 blocks"),
        ("full", lambda: SelectiveUpdate(TeacherDistance("nowhere")), "model.teacher"),
    ],
)
def test_unfit_methods_are_refused_before_training(
    tiny: Tiny, tmp_path: Path, config: str, callback: Callable[[], SelectiveUpdate], message: str
) -> None:
    method = made(config, tiny("bert"))
    before = weights(method)
    with pytest.raises(UserError, match=message):
        fit(method, tmp_path, callback())
    assert same(before, weights(method))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Random(rate=1.0), "rate: 1.0"),
        (lambda: LayerCyclic(blocks=0), "blocks: 0"),
        (lambda: LossEMA(decay=1.0), "decay: 1.0"),
        (lambda: SelectiveUpdate(Always(), depth=-1), "depth: -1"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


class WithoutHook(LightningModule):
    """A module without `step_wrapper`, which a callback could set."""


def test_several_devices_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="devices 1"):
        SelectiveUpdate(Random()).setup(quiet_trainer(devices=2, strategy="ddp"), made("full", tiny("bert")), "fit")


def test_a_module_without_the_hook_is_refused() -> None:
    callback: Any = SelectiveUpdate(Random())
    with pytest.raises(UserError, match="WithoutHook has no attribute step_wrapper"):
        callback.setup(quiet_trainer(), WithoutHook(), "fit")


def test_public_classes_of_the_module_are_policies() -> None:
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


def test_selective_update_is_set_by_flags(tmp_path: Path) -> None:
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
