"""What task arithmetic, DARE and TIES share: weighted sums, the election of signs, and their settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check
from ._base import Block, MergeMethod, Models, TensorInfo, setting


@dataclass(frozen=True, kw_only=True)
class TaskVectorMerge(MergeMethod):
    """Base of the methods that add a combination of task vectors (parent minus base) to the base.

    Args:
        weight: Weight of a parent.
        lambda_: Scale of the merged task vector.
    """

    operands = "task_vectors"
    needs_base = True
    base_is_parent = False
    ignored = frozenset({"int8_mask"})

    weight: float = setting(1.0, per_parent=True)
    lambda_: float = setting(1.0)

    def scaled(self, merged: Tensor, block: Block) -> Tensor:
        """Multiply a merged task vector by lambda in place."""
        scale = block.value("lambda_")
        return merged if scale == 1.0 else merged.mul_(scale)


def normalized(weights: Sequence[float], name: str) -> list[float]:
    """Return weights divided by their sum.

    Raises:
        ValueError: The sum is zero.
    """
    total = sum(weights)
    check(total != 0.0, "weight", list(weights), "of a sum other than zero, to be normalized", where=name)
    return [weight / total for weight in weights]


def check_normalizable(models: Models) -> None:
    """Refuse weights whose sum is zero, with the first tensor's name."""
    for tensor in models.tensors:
        normalized(tensor.values["weight"], tensor.name)


def coefficients(tensor: TensorInfo, normalize: bool) -> list[float]:
    """Return the weight of each task vector, lambda included."""
    weights: list[float] = tensor.values["weight"]
    shares = normalized(weights, tensor.name) if normalize else weights
    return [tensor.values["lambda_"] * share for share in shares]


def weighted_sum(operands: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_i weights[i] operands[i], in place of the first one.

    Args:
        operands: fp32 tensors of one shape.
        weights: One number for each.
    """
    total = operands[0] if weights[0] == 1.0 else operands[0].mul_(weights[0])
    for operand, weight in zip(operands[1:], weights[1:], strict=True):
        if weight != 0.0:
            total.add_(operand, alpha=weight)
    return total


@dataclass(frozen=True, kw_only=True)
class Election:
    """How signs are elected and the entries that agree are combined.

    Args:
        elect: "mass" for the sign of the sum, "count" for the sign that more entries have.
        combine: "mean", "sum" or "max" (the entry of largest magnitude) of the entries that agree.
        weights_last: Whether weights multiply after the election, and a mean divides by the number of those
            that agree; otherwise they take part in it, and a mean divides by the sum of their weights.
        zero_is_positive: What is elected where the sum is zero.
    """

    elect: str = "mass"
    combine: str = "mean"
    weights_last: bool = False
    zero_is_positive: bool = True

    def __call__(self, block: Block, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged vector.

        Args:
            block: For its buffers.
            vectors: fp32, of one shape; overwritten.
            weights: One for each.
        """
        weights = list(weights)
        if self.combine == "mean" and not self.weights_last and len(set(weights)) == 1 and weights[0] > 0:
            weights = [1.0] * len(weights)  # a common factor cancels
        flat = [vector.view(-1) for vector in vectors]
        if not self.weights_last:
            for vector, weight in zip(flat, weights, strict=True):
                if weight != 1.0:
                    vector.mul_(weight)
        sign = self._elected(block, flat)
        merged, shares, part = (
            block.buffer("merged").zero_(),
            block.buffer("shares").zero_(),
            block.buffer("part"),
        )
        for vector, weight in zip(flat, weights, strict=True):
            # What agrees is positive after the product with the sign, the rest is cut off.
            agreeing = torch.mul(vector, sign, out=part).clamp_(min=0.0)
            if self.combine == "max":
                torch.maximum(merged, agreeing.mul_(weight) if self.weights_last else agreeing, out=merged)
                continue
            merged.add_(agreeing, alpha=weight if self.weights_last else 1.0)
            if self.combine == "mean":
                shares.add_(agreeing.sign_(), alpha=1.0 if self.weights_last else weight)
        if self.combine == "mean":
            merged.div_(self._divisor(shares, weights))
        return merged.mul_(sign).view(vectors[0].shape)

    def _elected(self, block: Block, vectors: Sequence[Tensor]) -> Tensor:
        """Return the elected sign of each entry, 1 or -1."""
        score = block.buffer("score")
        if self.elect == "count":
            part = block.buffer("part")
            torch.sign(vectors[0], out=score)
            for vector in vectors[1:]:
                score.add_(torch.sign(vector, out=part))
        else:
            score.copy_(vectors[0])
            for vector in vectors[1:]:
                score.add_(vector)
        # 2 s + 1 and 2 s - 1 have the sign of s, and that of the constant where s is zero.
        return score.sign_().mul_(2.0).add_(1.0 if self.zero_is_positive else -1.0).clamp_(-1.0, 1.0)

    def _divisor(self, shares: Tensor, weights: Sequence[float]) -> Tensor:
        """Return the shares with what divides to zero where nothing agrees."""
        if self.weights_last:
            return shares.clamp_(min=1.0)
        if min(weights) > 0.0:
            return shares.clamp_(min=min(weights))
        # Weights of both signs, or zero, may cancel: what no weight stands behind becomes zero.
        return shares.masked_fill_(shares == 0.0, math.inf)
