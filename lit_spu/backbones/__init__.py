"""Pretrained models with one interface for all families."""

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.load import load_backbone
from lit_spu.backbones.precision import Precision
from lit_spu.backbones.stacks import (
    Batch,
    FrozenStates,
    HiddenStates,
    Stack,
    StateIndices,
    TransformerStacks,
    find_norms,
)
from lit_spu.backbones.target_linears import Role, TargetLinear

__all__ = [
    "Backbone",
    "Batch",
    "FrozenStates",
    "Head",
    "HiddenStates",
    "Precision",
    "Role",
    "Stack",
    "StateIndices",
    "TargetLinear",
    "TransformerStacks",
    "find_norms",
    "load_backbone",
]
