"""The global merge: replicas that were trained apart, averaged once at the end.

Source: Zhu et al. 2025, "On the Surprising Effectiveness of a Single Global Merging in Decentralized
Learning", arXiv 2507.06542: theta = (1/N) sum_i theta_i over what is learned, with statistics of batch norms
taken anew.

Differs from the paper: statistics of batch norms can be pooled from those of the replicas where no data are
at hand: mean = mean_i m_i and variance = mean_i (v_i + m_i^2) - mean^2, those of the mixture of the replicas'
inputs, which are near those of the merged model's and not the same. The gossip between replicas during
training is `LocalTrainCallback`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.batch_norm import MEAN, VARIANCE, recalibrate_batch_norm
from ..core.checks import check
from ._base import Block, MergeMethod, register_merge

__all__ = ["GlobalMerge", "recalibrate_batch_norm"]


@register_merge(
    "global_merge",
    summary="replicas that were trained apart, averaged once, with statistics of batch norms pooled",
    paper="arXiv:2507.06542",
    supports={"identity", "one_parent", "bit_identity"},
    bad_kwargs=({"bn": "recalibrate"}, {"bn": "mean"}, {"bn": 1}),
)
@dataclass(frozen=True, kw_only=True)
class GlobalMerge(MergeMethod):
    """Mean of replicas: theta = (1/N) sum_i theta_i.

    Statistics of batch norms fit the merged model best when they are taken anew from data: load the result
    and call `recalibrate_batch_norm(model, batches)`.

    Args:
        bn: Running variances of batch norms: "pool" for those of the mixture of the replicas' inputs, or
            "average" for their mean, without how far the means lie apart.
    """

    spaces = frozenset({"full"})
    bn: str = "pool"

    def validate(self) -> None:
        rule = "'pool' or 'average'; to recalibrate, call recalibrate_batch_norm(merged_model, batches)"
        check(self.bn in ("pool", "average"), "bn", self.bn, rule)

    def reads(self, name: str, parents: int) -> Sequence[tuple[int, str]] | None:
        own = [(parent, name) for parent in range(parents)]
        if not self._pools(name):
            return own
        mean = name.removesuffix(VARIANCE) + MEAN
        return own + [(parent, mean) for parent in range(parents)]

    def _pools(self, name: str) -> bool:
        return self.bn == "pool" and name.endswith(f".{VARIANCE}")

    def map(self, block: Block) -> Tensor:
        if not self._pools(block.tensor.name):
            return _mean(block.operands)
        count = len(block.operands) // 2
        variances, means = block.operands[:count], block.operands[count:]
        # The spread is taken around the first mean: equal means then add exactly nothing.
        offsets = [mean.sub_(means[0]) for mean in means[1:]]
        merged = _mean(variances)
        if not offsets:
            return merged
        squares = sum((offset.square() for offset in offsets[1:]), offsets[0].square())
        total = sum(offsets[1:], offsets[0].clone())
        return merged.add_(squares / count).sub_((total / count).square_())


def _mean(values: list[Tensor]) -> Tensor:
    """Return x_1 + sum_i (x_i - x_1) / N, which gives equal models back bit for bit."""
    first, count = values[0], len(values)
    differences = [value.sub_(first) for value in values[1:]]
    for difference in differences:
        first.add_(difference, alpha=1.0 / count)
    return first
