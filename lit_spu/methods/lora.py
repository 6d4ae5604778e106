"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): trained low-rank updates of frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from lit_spu.backbones import Role, TargetLinear, find_norms
from lit_spu.errors import UserError
from lit_spu.methods.frozen import FrozenBackbone
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.lora import LowRank
from lit_spu.nn.peft_format import init_from_peft_folder
from lit_spu.ranges import Count, Length, Positive, ShareBelowOne, Text


class LoRA(FrozenBackbone):
    """Train y = Wx + (α/r)·B(A x) at linear layers of the frozen backbone.

    Args:
        rank: r, the rank of B·A.
        alpha: α, which scales B·A by α/r.
        dropout: Share of the inputs of A that is dropped in training.
        roles: Roles of the linear layers that get a low-rank pair (A, B).
        layers: Number of blocks with pairs at the end (of an encoder-decoder, the decoder's); null for all blocks. No
            gradient passes below them.
        norms: Train the blocks' normalisation layers as well.
        rank_stabilised: Scale by α/√r, so that the size of a step does not fall with the rank
            (https://arxiv.org/abs/2312.03732).
        init: `zero` sets B = 0. `svd` (SiVA) sets B·A to the part of W of its top singular vectors, and freezes the
            rest of W. In both cases the initial logits are the backbone's.
        adapter: A folder of the peft library with initial pairs of this rank and scale for these linear layers.

    Raises:
        UserError: If a number is out of range, or the backbone has no linear layer of a role.
    """

    def __init__(
        self,
        rank: Count = 4,
        alpha: Positive = 8.0,
        dropout: ShareBelowOne = 0.0,
        roles: Annotated[Sequence[Role], Length(1)] = get_args(Role),
        layers: Count | None = None,
        norms: bool = False,
        rank_stabilised: bool = False,
        init: Literal["zero", "svd"] = "zero",
        adapter: Text | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

        def make_pair(target: TargetLinear) -> LowRank:
            pair = LowRank(target, rank, alpha, dropout, rank_stabilised).attach()
            if init == "svd":
                pair.init_from_svd()
            return pair

        blocks = self.backbone.last_blocks(layers, "model.layers")
        self.pairs = adapter_dict(map(make_pair, self.backbone.target_linears(*roles, blocks=blocks)))
        for block in blocks if norms else ():
            for norm in find_norms(block):
                self.backbone.unfreeze(norm)
        if adapter and init == "svd":
            raise UserError(f"model.adapter={adapter} and model.init=svd are both initial values: use one of them.")
        if adapter:
            init_from_peft_folder(self.backbone, self.adapters, Path(adapter))
            self.is_trained = True
            self.hparams["adapter"] = None  # a checkpoint holds the trained pairs; the folder may be gone
