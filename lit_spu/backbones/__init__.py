"""Pretrained models with one interface for all families."""

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.load import load_backbone
from lit_spu.backbones.precision import Precision
from lit_spu.backbones.stacks import Batch, HiddenStates, Stack, TransformerStacks
from lit_spu.backbones.target_linears import Role, TargetLinear

__all__ = [
    "Backbone",
    "Batch",
    "Head",
    "HiddenStates",
    "Precision",
    "Role",
    "Stack",
    "TargetLinear",
    "TransformerStacks",
    "load_backbone",
]
