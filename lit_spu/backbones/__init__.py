"""Pretrained models behind one face: what a method may ask of any of them."""

from lit_spu.backbones.base import (
    Backbone,
    Batch,
    Head,
    HiddenStates,
    Precision,
    Role,
    Stream,
    TargetLinear,
    TransformerStacks,
)
from lit_spu.backbones.families import load_backbone

__all__ = [
    "Backbone",
    "Batch",
    "Head",
    "HiddenStates",
    "Precision",
    "Role",
    "Stream",
    "TargetLinear",
    "TransformerStacks",
    "load_backbone",
]
