"""Linear merging: the weighted mean, or sum, of the models' weights.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", arXiv 2203.05482, section 2 (uniform soup: equal weights).

Differs from the paper: weights may differ between models and tensors. The mean is computed as
x_1 + sum_{i>1} w_i (x_i - x_1), which is the same number and gives equal models back unchanged, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ._base import Block, MergeMethod, Models, TensorInfo, register_merge, setting
from ._task_vectors import check_normalizable, normalized, weighted_sum

__all__ = ["Linear"]


@register_merge(
    "linear",
    summary="weighted mean of the weights, a model soup",
    paper="arXiv:2203.05482",
    supports={"identity", "one_parent", "bit_identity", "symmetric", "zero_weight"},
    bad_kwargs=({"weight": float("nan")}, {"weight": "much"}, {"normalize": "yes"}),
)
@dataclass(frozen=True, kw_only=True)
class Linear(MergeMethod):
    """Weighted mean (or sum) of the models' weights: theta = sum_i w_i theta_i / sum_i w_i.

    Args:
        weight: Weight of a model; any finite number.
        normalize: Whether to divide by the sum of the weights.
    """

    weighted_sum = True
    takes_slices = True
    aliases = MappingProxyType({"scale": "weight"})  # mergekit's name, in passthrough
    weight: float = setting(1.0, per_parent=True)
    normalize: bool = True

    def check_models(self, models: Models) -> None:
        if self.normalize:
            check_normalizable(models)

    def coefficients(self, tensor: TensorInfo) -> list[float]:
        weights: list[float] = tensor.values["weight"]
        return normalized(weights, tensor.name) if self.normalize else list(weights)

    def map(self, block: Block) -> Tensor:
        weights = self.coefficients(block.tensor)
        if not self.normalize:
            return weighted_sum(block.operands, weights)
        # From a model that counts, so that one with weight 0 is as if absent.
        anchor = next(index for index, weight in enumerate(weights) if weight != 0.0)
        first = block.operands[anchor]
        others = [
            (operand.sub_(first), weight)
            for index, (operand, weight) in enumerate(zip(block.operands, weights, strict=True))
            if index != anchor and weight != 0.0
        ]
        for difference, weight in others:
            first.add_(difference, alpha=weight)
        return first
