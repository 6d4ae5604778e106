"""Forward passes with perturbed weights, without a change to the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_spu.optim.noise import Noise


class Perturbed(TorchFunctionMode):
    """Context manager in which every torch function reads weight + scale·z in place of a weight.

    No weight is written, so nothing has to be restored, not even after an error. Where a function reads only some rows
    of a weight (an embedding, or an index), only these rows are perturbed.

    Args:
        weights: The perturbed weights, each with the key of its z.
        noise: Distribution of z.
        scale: Perturbation scale, with its sign.

    Attributes:
        rows_read: By the id of a weight, the row indices that were read; None where the whole weight was read.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, int]], noise: Noise, scale: float) -> None:
        super().__init__()
        self.keys = {id(weight): key for weight, key in weights}
        self.noise, self.scale = noise, scale
        self.rows_read: dict[int, list[Tensor] | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and id(args[1]) in self.keys:
            return self._select_rows(args[1], args[0])
        if func is Tensor.__getitem__ and id(args[0]) in self.keys and _selects_rows(*args):
            return self._select_rows(*args)
        if func is F.linear and id(args[1]) in self.keys:
            x, weight, bias = args if len(args) == 3 else (*args, kwargs.get("bias"))
            self.rows_read[id(weight)] = None
            return self.noise.perturbed_linear(self.keys[id(weight)], x, weight, self._perturb(bias), self.scale)
        if getattr(func, "__name__", "") == "__get__":  # an attribute: most, such as shape, need no perturbed weight
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor):
                return value
        args = [type(a)(map(self._perturb, a)) if isinstance(a, list | tuple) else self._perturb(a) for a in args]
        return func(*args, **{name: self._perturb(value) for name, value in kwargs.items()})

    def _perturb(self, value: Any) -> Any:
        """Return the perturbed value of a weight, and any other value unchanged."""
        if id(value) not in self.keys:
            return value
        self.rows_read[id(value)] = None
        return self.noise.perturb(self.keys[id(value)], value, self.scale)

    def _select_rows(self, weight: Tensor, row_indices: Tensor) -> Tensor:
        """Return the perturbed rows [..., width] of a weight [rows, width] for `row_indices` [...]."""
        rows, inverse = row_indices.unique(return_inverse=True)
        if (rows_read := self.rows_read.setdefault(id(weight), [])) is not None:
            rows_read.append(rows)
        z = self.noise.sample_rows(self.keys[id(weight)], weight, rows)
        z = z.to(torch.promote_types(weight.dtype, torch.float32))
        perturbed: Tensor = (weight[rows] + self.scale * z).to(weight.dtype)
        return perturbed[inverse]


def _selects_rows(weight: Tensor, index: Any) -> bool:
    """Return whether an index selects whole rows of a matrix by their indices."""
    return weight.dim() == 2 and isinstance(index, Tensor) and index.dtype is torch.long
