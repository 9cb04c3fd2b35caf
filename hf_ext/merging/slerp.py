"""SLERP: interpolate two models along the arc between them instead of the straight line.

Source: Shoemake 1985, "Animating Rotation with Quaternion Curves", SIGGRAPH 19(3), section 3.3: slerp(a, b,
t) = sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b, omega the angle between a and b.

Differs from the paper: it is applied to each tensor as one long vector, and the coefficients multiply the
vectors as they are, not made unit length, so that lengths are interpolated too. Where the vectors are
nearly parallel or opposite (|cos omega| > 0.9995), or one is zero, the interpolation is linear. The angle
is taken in fp64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check
from ._base import Block, MergeMethod, Models, TensorInfo, register_merge, setting
from ._parameters import numbers
from ._reductions import chunk_dots

__all__ = ["Slerp"]

_PARALLEL, _ZERO = 0.9995, 1e-8


@register_merge(
    "slerp",
    summary="two models interpolated along the arc between their weights",
    paper=None,
    supports={"identity", "two_parents"},
    test_kwargs={"t": 0.3},
    bad_kwargs=({"t": 1.5}, {"t": "half"}),
)
@dataclass(frozen=True, kw_only=True)
class Slerp(MergeMethod):
    """Spherical interpolation of exactly two models, tensor by tensor.

    Args:
        t: Position: 0 is the first model (the base, where one is given), 1 the second; in [0, 1].
        around_base: Whether to interpolate what the two differ from the base in, rather than the weights.
        extrapolate: Whether t may lie outside [0, 1].
    """

    takes_slices = True
    t: float = setting()
    around_base: bool = False
    extrapolate: bool = False

    @property
    def operands(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "task_vectors" if self.around_base else "weights"

    @property
    def needs_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.around_base

    @property
    def base_is_parent(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.around_base

    @property
    def base_is_first(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.around_base

    def validate(self) -> None:
        rule = "between 0 and 1, or extrapolate: true"
        outside = [t for t in numbers(self.t) if not 0.0 <= t <= 1.0]
        check(self.extrapolate or not outside, "t", outside[0] if outside else None, rule)

    def check_models(self, models: Models) -> None:
        rule = "exactly two, the base included" if self.base_is_first else "exactly two beside the base"
        check(len(models.labels) == 2, "models", list(models.labels), rule)

    @property
    def scans(self) -> int:
        return 1

    def scan(self, number: int, block: Block) -> list[list[float]]:
        a, b = block.operands
        return [chunk_dots(a, a), chunk_dots(b, b), chunk_dots(a, b)]

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if total is None:
            return part
        for sums, more in zip(total, part, strict=True):
            sums += more
        return total

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        aa, bb, ab = (math.fsum(sums) for sums in total)
        if not math.isfinite(aa + bb + ab):
            raise ValueError(f"{tensors[0].name}: NaN or infinite values in the models")
        norms = math.sqrt(aa), math.sqrt(bb)
        if min(norms) < _ZERO:
            return None
        cosine = max(-1.0, min(1.0, ab / (norms[0] * norms[1])))
        if cosine < -_PARALLEL:
            warnings.warn(f"{tensors[0].name}: the models are opposite; merged linearly", stacklevel=2)
        return None if abs(cosine) > _PARALLEL else math.acos(cosine)

    def map(self, block: Block) -> Tensor:
        a, b = block.operands
        t, angle = block.value("t"), block.states[0]
        if t in (0.0, 1.0):
            return b if t else a
        if angle is None:
            return torch.lerp(a, b, t, out=a)
        left, right = (math.sin(share * angle) / math.sin(angle) for share in (1.0 - t, t))
        return a.mul_(left).add_(b, alpha=right)
