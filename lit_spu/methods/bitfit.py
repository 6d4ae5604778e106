"""BitFit (Ben Zaken, Goldberg, Ravfogel 2021, https://arxiv.org/abs/2106.10199): train the biases alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_spu.methods.base import Method


class BitFit(Method):
    """Freeze the weights of the backbone and train its biases.

    Linear layers without a bias (all of a T5's) get one of zero, as in the comparison of LST's authors.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.freeze()
        for part in (*self.backbone.base_model.embeddings, *self.backbone.blocks):
            for module in part.modules():
                if isinstance(module, nn.Linear) and module.bias is None:
                    module.bias = nn.Parameter(torch.zeros(module.out_features))
                if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                    bias.requires_grad_(True)
