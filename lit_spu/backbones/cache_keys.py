"""Keys of the activation cache: digests of all that hidden states are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b, sha256
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.cached_states import Array
from lit_spu.backbones.precision import is_quantized
from lit_spu.backbones.stacks import StateIndices


def digest_texts(inputs: Mapping[str, Tensor], counts: Array) -> list[bytes]:
    """Return a digest of the backbone's inputs for each text, without padding."""
    padded = inputs["input_ids"].shape
    arrays = [(t.cpu().numpy(), t.shape == padded) for name, t in inputs.items() if not name.endswith("mask")]
    return [
        blake2b(b"".join((t[row, :count] if cut else t[row]).tobytes() for t, cut in arrays), digest_size=16).digest()
        for row, count in enumerate(counts.tolist())
    ]


def digest_backbone(backbone: Backbone, wanted: StateIndices) -> str:
    """Return a digest of all that determines the wanted hidden states: weights of the blocks, settings and code."""
    model, digest = backbone.base_model.model, sha256()
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("id2label", "label2id") and not name.startswith("_")  # labels and paths change no state
    }
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    packages = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    digest.update(repr((code, config, device, autocast, packages, wanted)).encode())
    above = nn.ModuleList([*backbone.head_modules, *backbone.base_model.blocks_above(wanted)])
    unread = set(above.parameters())  # a BERT's pooler reads the hidden states and does not change them
    for name, parameter in model.named_parameters():
        if parameter not in unread:
            plain = parameter.dequantize() if is_quantized(parameter) else parameter
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
