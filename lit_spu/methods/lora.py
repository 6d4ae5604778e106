"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): frozen weights with learned low-rank pairs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lit_spu.backbones import Role, TargetLinear
from lit_spu.errors import UserError
from lit_spu.methods.base import FrozenBackbone
from lit_spu.nn import peft_format
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.lora import LowRank


class LoRA(FrozenBackbone):
    """Train y = Wx + (α/r)·B(A x) at linears of the frozen backbone.

    Args:
        rank: r, the rank of B·A.
        alpha: α, which scales B·A by α/r.
        dropout: Share of its inputs that A does not see in training.
        roles: The linears that get a pair, by what they do in a block.
        norms: Train the blocks' normalisation layers as well.
        rank_stabilised: Scale by α/√r, so that the size of a step does not fall with the rank
            (https://arxiv.org/abs/2312.03732).
        init: B = 0, or SiVA's: B·A are the top singular vectors of W, and the rest of W is frozen. Either way the
            backbone's answers are what they were at the start.
        adapter: A folder of the peft library's to start from, with the same rank, scale and linears.

    Raises:
        UserError: if a number is out of range, or the backbone has no linear of a role.
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
        roles: Sequence[Role] = get_args(Role),
        norms: bool = False,
        rank_stabilised: bool = False,
        init: Literal["zero", "svd"] = "zero",
        adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        targets = self.backbone.target_linears(*roles)

        def pair(target: TargetLinear) -> LowRank:
            made = LowRank(target, rank, alpha, dropout, rank_stabilised).attach()
            if init == "svd":
                made.take_top()
            return made

        self.pairs = adapter_dict(map(pair, targets))
        for norm in self.backbone.norms if norms else ():
            self.backbone.unfreeze(norm)
        if adapter and init == "svd":
            raise UserError(f"model.adapter={adapter} gives a start, and model.init=svd another: give one of them.")
        if adapter:
            peft_format.read(self.backbone, self.adapters, Path(adapter))
            self.hparams["adapter"] = None  # a checkpoint holds what was trained; the folder may be gone
