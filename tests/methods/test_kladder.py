"""k-ladder as a method. The fusions' maths and the windows are in tests/nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch

from lit_spu.errors import UserError
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.nn import fusion as fusions
from tests.conftest import encode

Tiny = Callable[[str], str]
FUSIONS = get_args(get_type_hints(KLadder.__init__)["fusion"])


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_radius_zero_is_lst_bitwise(tiny: Tiny, family: str) -> None:
    torch.manual_seed(0)
    lst = LadderSideTuning(backbone=tiny(family), reduction=2)
    torch.manual_seed(0)
    ladder = KLadder(k=0, backbone=tiny(family), reduction=2)
    ladder.load_state_dict(lst.state_dict(), strict=False)
    batch = encode(lst.backbone)
    losses = [method.eval().loss(batch) for method in (lst, ladder)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    theirs = dict(ladder.named_parameters())
    for name, parameter in lst.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
def test_every_fusion_trains_all_it_has(tiny: Tiny, family: str, fusion: Any, share: bool) -> None:
    method = KLadder(k=1, fusion=fusion, share_projections=share, backbone=tiny(family), reduction=2).train()
    batch = encode(method.backbone)
    optimizer = torch.optim.AdamW(method.side.parameters(), lr=0.003)
    first = method.loss(batch)
    for _ in range(50):
        optimizer.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in method.side.parameters())
    assert loss.item() < first.item()


def test_shared_projections_cost_no_more_than_lst_s(tiny: Tiny) -> None:
    def count(method: LadderSideTuning) -> int:
        return sum(p.numel() for p in method.side.parameters())

    lst = count(LadderSideTuning(backbone=tiny("bert"), reduction=2))
    assert count(KLadder(k=2, backbone=tiny("bert"), reduction=2)) == lst + 4 * 5  # the slots' weights
    each = 32 * 16 + 16
    windows = 3 + 4 + 4 + 3  # of five slots, those inside the backbone
    own = count(KLadder(k=2, share_projections=False, backbone=tiny("bert"), reduction=2))
    assert own == lst + 4 * 5 + (windows - 4) * each


def test_every_fusion_can_be_chosen() -> None:
    offered = {
        name.lower() for name, cls in vars(fusions).items() if isinstance(cls, type) and issubclass(cls, fusions.Fusion)
    }
    assert offered - {"fusion", "gate"} == set(FUSIONS)


def test_a_negative_radius_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model\.k=-1"):
        KLadder(k=-1, backbone=tiny("bert"))
