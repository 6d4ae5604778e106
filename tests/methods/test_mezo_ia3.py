"""MeZO over (IA)3: what moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from lit_spu.data.glue import GLUE
from lit_spu.methods.mezo_ia3 import MeZOIA3

Run = Callable[..., Trainer]


def test_vectors_alone_move(data: Callable[..., GLUE], fit: Run) -> None:
    method = MeZOIA3(lr=1e-2)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    fit(method, data())
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in method.named_parameters() if p.requires_grad}
    assert all(name.startswith("scales.") for name in moved)
