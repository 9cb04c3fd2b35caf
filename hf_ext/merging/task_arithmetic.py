"""Task arithmetic: add scaled task vectors to the base, or take them away.

Source: Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2: tau =
theta_ft - theta_pre, theta_new = theta_pre + lambda sum_i tau_i.

Differs from the paper: each task vector may have a weight of its own, by tensor; normalize divides by their
sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._base import Block, Models, TensorInfo, register_merge
from ._task_vectors import TaskVectorMerge, check_normalizable, coefficients, weighted_sum

__all__ = ["TaskArithmetic"]


@register_merge(
    "task_arithmetic",
    summary="the base plus a weighted sum of task vectors; a negative weight takes a task away",
    paper="arXiv:2212.04089",
    supports={"one_parent", "symmetric", "zero_weight"},
    test_kwargs={"weight": 0.5},
    bad_kwargs=({"lambda": float("inf")}, {"weight": []}),
)
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(TaskVectorMerge):
    """Base plus weighted task vectors: theta = theta_0 + lambda sum_i w_i (theta_i - theta_0).

    Args:
        normalize: Whether to divide by the sum of the weights.
    """

    weighted_sum = True
    takes_slices = True
    normalize: bool = False

    def check_models(self, models: Models) -> None:
        if self.normalize:
            check_normalizable(models)

    def coefficients(self, tensor: TensorInfo) -> list[float]:
        return coefficients(tensor, self.normalize)

    def map(self, block: Block) -> Tensor:
        return weighted_sum(block.operands, self.coefficients(block.tensor))
