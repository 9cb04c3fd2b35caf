"""Sparse soups: the mean of pruned models that share a mask, with exactly its zeros.

Source: Zimmer, Spiegel and Pokutta 2023, "Sparse Model Soups: A Recipe for Improved Pruning via Model
Averaging", arXiv 2306.16788, algorithm 1: prune by global magnitude, retrain m copies that differ in one
thing, average them, and again.

Differs from the paper: none in the algorithm. The masks of models that are merged from files are read off
their zeros: a matrix with a zero in one model that is none in another is refused, because the mean would lose
it. N:M patterns are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._base import Block, MergeMethod, Models, TensorInfo, register_merge, setting
from ._pruning import apply_masks, magnitude_masks, masks_enforced
from ._sparse_soups import SparseSoupResult, greedy_choice, phase_sparsities, prune_retrain_average
from ._task_vectors import check_normalizable, normalized

__all__ = [
    "SparseSoup",
    "SparseSoupResult",
    "apply_masks",
    "greedy_choice",
    "magnitude_masks",
    "masks_enforced",
    "phase_sparsities",
    "prune_retrain_average",
]


@register_merge(
    "sparse_soup",
    summary="mean of pruned models that share a mask; their sparsity is kept exactly",
    paper="arXiv:2306.16788",
    supports={"identity", "one_parent", "bit_identity", "symmetric", "zero_weight"},
    bad_kwargs=({"weight": float("inf")}, {"weight": "much"}, {"check_masks": "no"}),
)
@dataclass(frozen=True, kw_only=True)
class SparseSoup(MergeMethod):
    """Weighted mean of models with equal zeros: theta = sum_i w_i theta_i / sum_i w_i.

    Args:
        weight: Weight of a model; any finite number.
        check_masks: Whether to refuse models whose matrices do not have the same zeros.
    """

    spaces = frozenset({"full"})
    weight: float = setting(1.0, per_parent=True)
    check_masks: bool = True

    def check_models(self, models: Models) -> None:
        check_normalizable(models)

    @property
    def scans(self) -> int:
        return int(self.check_masks)

    def scan(self, number: int, block: Block) -> list[int] | None:
        """Count the zeros of each model that counts, and last those that all of them have."""
        if len(block.tensor.shape) < 2:  # biases and norms are not pruned
            return None
        zeros = [block.operands[index] == 0.0 for index in self._counted(block.tensor)]
        common = zeros[0].clone()
        for other in zeros[1:]:
            common &= other
        return [int(torch.count_nonzero(found)) for found in (*zeros, common)]

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if total is None or part is None:
            return part if total is None else total
        return [count + more for count, more in zip(total, part, strict=True)]

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        tensor = tensors[0]
        if total is None or total[:-1] == [total[-1]] * (len(total) - 1):
            return None
        labels = [tensor.labels[index] for index in self._counted(tensor)]
        counts = ", ".join(f"{label} {count}" for label, count in zip(labels, total[:-1], strict=True))
        raise ValueError(
            f"{tensor.name}: the models do not have the same zeros, so that their mean would lose some: "
            f"{counts}, all together {total[-1]}, of {tensor.numel}. Retrain the copies with one mask, or "
            "give check_masks: false"
        )

    def _counted(self, tensor: TensorInfo) -> list[int]:
        weights: list[float] = tensor.values["weight"]
        return [index for index, weight in enumerate(weights) if weight != 0.0]

    def map(self, block: Block) -> Tensor:
        weights = normalized(block.per_parent("weight"), block.tensor.name)
        anchor, *others = self._counted(block.tensor)
        first = block.operands[anchor]
        differences = [(block.operands[index].sub_(first), weights[index]) for index in others]
        for difference, weight in differences:
            first.add_(difference, alpha=weight)
        return first
