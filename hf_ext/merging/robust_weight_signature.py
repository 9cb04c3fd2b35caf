"""Robust weight signatures: what training on corrupted data changed, as a small patch of shallow layers.

Source: Cai, Zhang and Wang 2023, "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?",
arXiv 2302.12480.

Differs from the paper and its code: a signature's strength multiplies once (the code multiplies before the
projection and again in the sum). Codes are symmetric around an exact zero by default, and a range of zero is
no division by zero. Shallow layers are the first modules with weights in the order that their names or the
given order tell; normalization layers are left as they are unless asked for, and are not re-estimated from
data. Taking a signature off restores the bits: originals are kept, and every change starts from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.checks import check
from ._base import Block, MergeMethod, Models, TensorInfo, register_merge, setting
from ._deltas import projection
from ._reductions import chunk_dots
from ._signatures import (
    Signature,
    SignaturePatch,
    apply_signatures,
    extract_signature,
    read_signature,
    remove_signatures,
    shallow,
    signature_to_lora,
)
from ._task_vectors import weighted_sum

__all__ = [
    "RobustWeightSignature",
    "Signature",
    "SignaturePatch",
    "apply_signatures",
    "extract_signature",
    "read_signature",
    "remove_signatures",
    "signature_to_lora",
]


@register_merge(
    "robust_weight_signature",
    summary="what training on corrupted data changed, as a small patch to add, scale and take off",
    paper="arXiv:2302.12480",
    bad_kwargs=({"alpha": 3.0}, {"keep_num": 0}, {"keep_num": 2.5}),
)
@dataclass(frozen=True, kw_only=True)
class RobustWeightSignature(MergeMethod):
    """The first model with the signatures of the others: theta = theta_1 + 1/C sum_c alpha_c s_c.

    s_c = v_c - (<v_c, a> / <a, a>) a, tensor by tensor, with a = theta_1 - theta_0 and v_c = theta_c -
    theta_0. The first model is trained on clean data, the others on corrupted data, all from the base. This
    adds signatures once and for all; `extract_signature`, `apply_signatures` and `remove_signatures` keep
    them apart.

    Args:
        alpha: Strength of a model's signature, in [-2, 2]; that of the first model has no effect.
        keep_num: Number of shallow layers (modules with weights) that are patched.
    """

    operands = "task_vectors"
    needs_base = True
    base_is_parent = False
    spaces = frozenset({"full"})

    alpha: float = setting(1.0, rule="between -2 and 2", fits=lambda x: -2.0 <= x <= 2.0, per_parent=True)
    keep_num: int = 7

    def validate(self) -> None:
        check(self.keep_num >= 1, "keep_num", self.keep_num, "at least 1")

    def check_models(self, models: Models) -> None:
        rule = "the clean model and at least one trained on corrupted data"
        check(len(models.labels) >= 2, "models", list(models.labels), rule)
        shapes = {tensor.name: tensor.shape for tensor in models.tensors}
        # No setting, but what the setting means for these models.
        object.__setattr__(self, "_patched", frozenset(shallow(shapes, self.keep_num, None)))

    @property
    def scans(self) -> int:
        return 1

    def scan(self, number: int, block: Block) -> list[list[float]]:
        clean = block.operands[0]
        return [chunk_dots(change, clean) for change in block.operands]

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if total is None:
            return part
        for sums, more in zip(total, part, strict=True):
            sums += more
        return total

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        (tensor,) = tensors
        flat = [x for sums in total for x in sums]
        if not all(map(math.isfinite, flat)):
            raise ValueError(f"{tensor.name}: NaN or infinite values in the models")
        square, *products = (math.fsum(sums) for sums in total)
        if tensor.name not in self._patched:  # pyright: ignore[reportAttributeAccessIssue]
            return [1.0] + [0.0] * len(products)
        weights = [alpha / len(products) for alpha in tensor.values["alpha"][1:]]
        shares = [projection(product, square) for product in products]
        return [1.0 - math.fsum(w * k for w, k in zip(weights, shares, strict=True)), *weights]

    def map(self, block: Block) -> Tensor:
        return weighted_sum(block.operands, block.states[0])
