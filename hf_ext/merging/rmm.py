"""RMM: a small basis shared by several models, from which each of them can be restored.

Source: Alipour and Amiri 2025, "Towards Reversible Model Merging For Low-rank Weights", arXiv 2510.14163.

Differs from the paper: no code is published, and whether it centers the vectors is not certain; here that is
a choice (`center`), off because p + 1 plain basis vectors are never worse than a mean and p more. The
basis may also be that of a whole factor or of a layer (`granularity`), factors may be turned to meet
(`align`), a budget in bytes may be spread over the factors by what it saves, and an adapter can be added
later. Factors for which a basis saves nothing are stored as they are. As a merge method it works on whole
tensors of any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check
from ._base import Block, MergeMethod, Models, TensorInfo, register_merge
from ._basis_store import (
    StoreReport,
    add_adapter,
    read_store,
    restore_adapter,
    restore_state,
    store_adapters,
)
from ._reductions import chunk_dots
from ._task_vectors import weighted_sum

__all__ = [
    "Rmm",
    "StoreReport",
    "add_adapter",
    "read_store",
    "restore_adapter",
    "restore_state",
    "store_adapters",
]


@register_merge(
    "rmm",
    summary="adapters stored as one small basis, from which each can be restored; or a model rebuilt from it",
    paper="arXiv:2510.14163",
    bad_kwargs=({"basis_size": 0}, {"basis_size": 1.5}, {"model": -1}, {"model": "first"}),
)
@dataclass(frozen=True, kw_only=True)
class Rmm(MergeMethod):
    """One model rebuilt from the basis_size leading directions of all models' changes, tensor by tensor.

    With task vectors X = U diag(s) V^T of a tensor, model i becomes theta_0 + X V_p V_p^T e_i. It shows what
    a store of that basis would restore; `store_adapters` and `restore_adapter` write and read stores of
    adapters.

    Args:
        basis_size: Number of directions (p), from 1 to the number of models; at that number nothing is lost.
        model: Which model comes out, by its number from 1 on; 0 for the mean of all of them as rebuilt.
    """

    operands = "task_vectors"
    needs_base = True
    base_is_parent = False
    spaces = frozenset({"full", "factors", "merge_into_base"})

    basis_size: int = 2
    model: int = 0

    def validate(self) -> None:
        check(self.basis_size >= 1, "basis_size", self.basis_size, "at least 1")
        check(self.model >= 0, "model", self.model, "at least 0")

    def check_models(self, models: Models) -> None:
        count = len(models.labels)
        rule = f"at most {count}, the number of models"
        check(self.basis_size <= count, "basis_size", self.basis_size, rule)
        check(self.model <= count, "model", self.model, rule)

    @property
    def scans(self) -> int:
        return 1

    def scan(self, number: int, block: Block) -> list[list[float]]:
        found: list[list[float]] = []
        for index, a in enumerate(block.operands):
            found += [chunk_dots(a, b) for b in block.operands[: index + 1]]
        return found

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if total is None:
            return part
        for sums, more in zip(total, part, strict=True):
            sums += more
        return total

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        sums = [math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan for sums in total]
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"{tensors[0].name}: NaN or infinite values in the models")
        count = tensors[0].parents
        gram = torch.zeros(count, count, dtype=torch.float64)
        rows, columns = torch.tril_indices(count, count)
        gram[rows, columns] = torch.tensor(sums, dtype=torch.float64)
        _, v = torch.linalg.eigh(gram)  # reads the lower triangle; eigenvalues rise
        kept = v[:, -self.basis_size :]
        onto = kept @ kept.T
        return (onto[:, self.model - 1] if self.model else onto.mean(dim=1)).tolist()

    def map(self, block: Block) -> Tensor:
        return weighted_sum(block.operands, block.states[0])
