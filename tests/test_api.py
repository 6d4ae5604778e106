"""The Python interface: names found without a list, ten lines that train, and loading what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import lit_spu
from lit_spu.errors import UserError


def test_names_lead_to_the_classes_themselves() -> None:
    from lit_spu import GLUE, FullFineTuning, KLadder, Memory
    from lit_spu.callbacks.memory import Memory as memory
    from lit_spu.data.glue import GLUE as glue
    from lit_spu.methods.full import FullFineTuning as full
    from lit_spu.methods.kladder import KLadder as kladder

    assert (GLUE, FullFineTuning, KLadder, Memory) == (glue, full, kladder, memory)


def test_every_public_name_is_found_and_unique() -> None:
    names = [cls.__name__ for cls in lit_spu._classes()]
    assert {"GLUE", "KLadder", "Memory"} < set(names)
    assert len(names) == len(set(names))
    assert set(names) < set(dir(lit_spu))
    for cls in lit_spu._classes():
        assert getattr(lit_spu, cls.__name__) is cls


def test_a_mistyped_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(AttributeError, match=r"'Kladdr'. Did you mean KLadder\?"):
        lit_spu.Kladdr  # noqa: B018
    with pytest.raises(AttributeError, match="kladder"):
        lit_spu.kladder_  # noqa: B018
    with pytest.raises(ImportError, match="Lader"):
        from lit_spu import Lader  # noqa: F401


@pytest.mark.filterwarnings("ignore:The number of training batches")  # a run of two steps
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen backbone
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")  # torch on Lightning's use of its pytrees
def test_ten_lines_train(tiny: Callable[[str], str], tmp_path: Path) -> None:
    from lit_spu import GLUE, KLadder

    method = KLadder(backbone=tiny("bert"), reduction=2, k=1, lr=0.01)
    before = {name: weight.clone() for name, weight in method.state_dict().items()}
    data = GLUE(task="sst2", limit_train=64, limit_validation=16, cache=str(tmp_path / "cache"))
    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(method, data)
    assert trainer.global_step == 2
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
    changed = {name for name, weight in method.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert changed <= {name for name, weight in method.named_parameters() if weight.requires_grad}

    # what it learned is in the checkpoint
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = KLadder.load_from_checkpoint(file, weights_only=True)
    for name, weight in method.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_load_gives_the_best_of_a_run_ready_to_answer(tiny: Callable[[str], str], tmp_path: Path) -> None:
    from lit_spu.__main__ import main

    run = tmp_path / "run"
    flags = [
        "--data.limit_train=64",
        "--data.limit_validation=16",
        f"--data.cache={tmp_path}/cache",
        f"--run_dir={run}",
    ]
    main(["fit", "--model=KLadder", f"--model.backbone={tiny('bert')}", "--model.reduction=2", *flags])
    method = lit_spu.load(run)
    assert type(method) is lit_spu.KLadder
    assert not method.training
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert best
    for name, weight in best.items():
        torch.testing.assert_close(method.state_dict()[name], weight, rtol=0, atol=0)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        lit_spu.load(tmp_path / "absent")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not the checkpoint of a method"):
        lit_spu.load(tmp_path / "other.ckpt")
