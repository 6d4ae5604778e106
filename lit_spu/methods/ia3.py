"""(IA)³ (Liu et al. 2022, https://arxiv.org/abs/2205.05638): learned vectors scale what passes in a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_spu.backbones import Role
from lit_spu.errors import UserError
from lit_spu.methods.base import FrozenBackbone
from lit_spu.nn import peft_format
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.ia3 import Scale


class IA3(FrozenBackbone):
    """Train vectors, ones at the start, that multiply the states around linears of the frozen backbone.

    Args:
        outputs: The linears whose outputs are scaled, by what they do in a block.
        inputs: Those whose inputs are scaled. The paper scales the inner state of the feed-forward, which is what
            `down` reads; on the linear in front of it a negative scale would not pass a ReLU.
        adapter: A folder of the peft library's to start from, with vectors at the same linears.

    Raises:
        UserError: if nothing is scaled, a role stands in both, or the backbone has no linear of a role.
    """

    def __init__(
        self,
        outputs: Sequence[Role] = ("key", "value"),
        inputs: Sequence[Role] = ("down",),
        adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if set(outputs) & set(inputs) or not {*outputs, *inputs}:
            raise UserError(
                f"model.outputs={list(outputs)}, model.inputs={list(inputs)}: give each role to one of them, and at"
                " least one role."
            )
        targets = self.backbone.target_linears(*outputs, *inputs)
        self.scales = adapter_dict(Scale(target, inputs=target.role in inputs).attach() for target in targets)
        if adapter:
            peft_format.read(self.backbone, self.adapters, Path(adapter))
            self.hparams["adapter"] = None  # a checkpoint holds what was trained; the folder may be gone
