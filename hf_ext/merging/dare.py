"""DARE: drop entries of the task vectors at random and rescale the rest, then merge.

Source: Yu et al. 2023, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", arXiv 2311.03099, section 3.1: m ~ Bernoulli(p), delta' = (1 - m) delta / (1 - p); here density = 1
- p.

Differs from the paper: masks are drawn by position (see `_random`), so that they do not depend on blocks,
threads or further models. rescale="l1" divides instead by what is left of the tensor's L1 norm, as mergekit
does with
rescale: true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.registry import Variant
from ._base import Block, Models, TensorInfo, choice, register_merge, setting
from ._random import bernoulli
from ._reductions import chunk_sums
from ._task_vectors import Election, TaskVectorMerge, check_normalizable, coefficients, weighted_sum

__all__ = ["Dare"]


@register_merge(
    "dare",
    summary="task vectors thinned out at random and rescaled, then summed or merged by elected signs",
    paper="arXiv:2311.03099",
    supports={"one_parent", "zero_weight"},
    test_kwargs={"density": 0.5, "merge": "linear"},
    bad_kwargs=({"density": 0.0}, {"density": 1.1}, {"rescale": "l2"}, {"merge": "median"}),
    variants=(
        Variant(name="ties", test_kwargs={"merge": "ties"}),
        Variant(name="l1", test_kwargs={"rescale": "l1"}),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Dare(TaskVectorMerge):
    """theta = theta_0 + lambda sum_i w_i m_i tau_i / density, m_i a random mask.

    Args:
        density: Share of a task vector's entries that is kept, in (0, 1]. The paper goes down to 0.1 and
            below for fine-tuned models.
        rescale: "density" divides by it; "l1" restores the L1 norm of each tensor's task vector (mergekit's
            true); "none" leaves the entries as they are (mergekit's false).
        merge: "linear" for the weighted sum, "ties" for the election of signs (mergekit's dare_linear and
            dare_ties).
        normalize: Whether to divide by the sum of the weights (of those that agree, for "ties").
    """

    takes_slices = True
    density: float = setting(rule="above 0 and at most 1", fits=lambda x: 0.0 < x <= 1.0, per_parent=True)
    rescale: str = choice("density", ("density", "l1", "none"))
    merge: str = choice("linear", ("linear", "ties"))
    normalize: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, object], where: str) -> dict[str, Any]:
        given = dict(given)
        if isinstance(given.get("rescale"), bool):
            given["rescale"] = "l1" if given["rescale"] else "none"
        return super().parse(given, where)

    def check_models(self, models: Models) -> None:
        if self.normalize and self.merge == "linear":
            check_normalizable(models)

    @property
    def scans(self) -> int:
        return 1 if self.rescale == "l1" else 0

    def _mask(self, block: Block, index: int) -> Tensor | None:
        density = block.per_parent("density")[index]
        if density >= 1.0:
            return None
        count = block.stop - block.start
        return bernoulli(density, block.seed, index, block.tensor.name, block.start, count)

    def scan(self, number: int, block: Block) -> Any:
        sums: list[Any] = []
        for index, values in enumerate(block.operands):
            mask = self._mask(block, index)
            size = values.abs()
            sums.append(None if mask is None else [chunk_sums(size), chunk_sums(size.mul_(mask))])
        return sums

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if total is None:
            return part
        for sums, more in zip(total, part, strict=True):
            if sums is not None:
                sums[0] += more[0]
                sums[1] += more[1]
        return total

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        norms = [None if sums is None else (math.fsum(sums[0]), math.fsum(sums[1])) for sums in total]
        return [1.0 if norm is None or norm[1] == 0.0 else norm[0] / norm[1] for norm in norms]

    def map(self, block: Block) -> Tensor:
        for index, values in enumerate(block.operands):
            mask = self._mask(block, index)
            if mask is None:
                continue
            values.mul_(mask)
            if self.rescale == "density":
                values.div_(block.per_parent("density")[index])
            elif self.rescale == "l1":
                values.mul_(block.states[0][index])
        if self.merge == "linear":
            return weighted_sum(block.operands, coefficients(block.tensor, self.normalize))
        rule = Election(combine="mean" if self.normalize else "sum")
        return self.scaled(rule(block, block.operands, block.per_parent("weight")), block)
