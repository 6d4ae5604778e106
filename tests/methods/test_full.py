"""Full fine-tuning is plain PyTorch training of the plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_spu.data.glue import GLUE
from lit_spu.methods.full import FullFineTuning


def test_steps_equal_a_plain_loop(
    tiny: Callable[[str], str], data: Callable[..., GLUE], fit: Callable[..., Trainer]
) -> None:
    folder = tiny("bert")
    torch.manual_seed(3)
    method = FullFineTuning(backbone=folder, lr=0.01, warmup=0.0)
    torch.manual_seed(3)
    plain: Any = FullFineTuning(backbone=folder).backbone.model.train()
    module = data()
    fit(method, module)
    batches = list(module.train_dataloader())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (len(batches) - step) / len(batches)
        inputs = {name: batch[name] for name in batch if name not in ("labels", "index")}
        optimizer.zero_grad()
        plain(**inputs, labels=batch["labels"]).loss.backward()
        optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(method.backbone.model.get_parameter(name), parameter, atol=1e-5, rtol=1e-4, msg=name)


def test_recomputed_blocks_give_the_same_gradients(tiny: Callable[[str], str]) -> None:
    from lit_spu.measure.saved import SavedForBackward
    from tests.conftest import encode

    gradients, saved = [], []
    for recompute in (False, True):
        torch.manual_seed(3)
        method = FullFineTuning(backbone=tiny("bert"), gradient_checkpointing=recompute).train()
        batch = encode(method.backbone)
        with SavedForBackward(method.parameters()) as counter:
            loss = method.loss(batch)
        saved.append(counter.nbytes)
        loss.backward()
        gradients.append([p.grad for p in method.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert saved[1] < saved[0] / 3
