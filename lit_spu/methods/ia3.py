"""(IA)³ (Liu et al. 2022, https://arxiv.org/abs/2205.05638): learned vectors scale states inside a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from lit_spu.backbones import Role
from lit_spu.errors import UserError
from lit_spu.methods.frozen import FrozenBackbone
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.peft_format import init_from_peft_folder
from lit_spu.ranges import Count, Length, Text


class IA3(FrozenBackbone):
    """Train vectors, initially ones, that multiply the inputs or outputs of linear layers of the frozen backbone.

    Args:
        outputs: Roles of the linear layers to scale the outputs of.
        inputs: Roles of the linear layers to scale the inputs of. The paper scales the inner state of the feed-forward,
            the input of `down`. At the outputs of `up`, a negative scale would not pass a ReLU.
        layers: Number of blocks with scales at the end (of an encoder-decoder, the decoder's); null for all blocks.
        adapter: A folder of the peft library with initial vectors for these linear layers.

    Raises:
        UserError: If nothing is scaled, a role is in both lists, or the backbone has no linear layer of a role.
    """

    def __init__(
        self,
        outputs: Annotated[Sequence[Role], Length()] = ("key", "value"),
        inputs: Annotated[Sequence[Role], Length()] = ("down",),
        layers: Count | None = None,
        adapter: Text | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if set(outputs) & set(inputs) or not {*outputs, *inputs}:
            raise UserError(
                f"model.outputs={list(outputs)}, model.inputs={list(inputs)}: put each role in one of the lists, and at"
                " least one role in total."
            )
        blocks = self.backbone.last_blocks(layers, "model.layers")
        targets = self.backbone.target_linears(*outputs, *inputs, blocks=blocks)
        self.scales = adapter_dict(Scale(target, inputs=target.role in inputs).attach() for target in targets)
        if adapter:
            init_from_peft_folder(self.backbone, self.adapters, Path(adapter))
            self.is_trained = True
            self.hparams["adapter"] = None  # a checkpoint holds the trained vectors; the folder may be gone
