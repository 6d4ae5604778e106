"""Rounding of updated weights to half precision, whose numbers are further apart than most updates are long."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["residual", "stochastic", "nearest"]

_SPARE_BITS = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}
"""For each half precision: the bits of fp32's mantissa beyond its own, and a factor that maps its exponents, those of
subnormal numbers too, to fp32's."""


def is_half(dtype: torch.dtype) -> bool:
    """Return whether updates of weights of this dtype have to be rounded."""
    return dtype in _SPARE_BITS


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round fp32 numbers up or down to half precision, so that their mean stays.

    A random number is added to the bits that are cut off then. NaN and infinity stay, and finite numbers stay finite.
    """
    num_bits, factor = _SPARE_BITS[dtype]
    bits = (exact * factor).view(torch.int32)
    bits.add_(torch.empty_like(bits).random_(0, 2**num_bits, generator=generator)).bitwise_and_(-(2**num_bits))
    limit = torch.finfo(dtype).max
    return (bits.view(torch.float32) / factor).clamp_(-limit, limit).where(exact.isfinite(), exact).to(dtype)
