"""OPCM: models merged one after another, each projected off the directions that are already taken.

Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable
Continual Model Merging", arXiv 2501.09522 (orthogonal projection-based continual merging).

Differs from the paper: the projection is computed from thin factors, C = T - U_r U_r^T T V_r V_r^T -
sum_{i >= r} u_i (u_i^T T v_i) v_i^T, which equals the form with full bases. As in the authors' maintained
code the blocks beside the leading one stay (`drop_cross` clears them, as the paper's text can be read), and
the diagonal is cleared, so that what a model adds is orthogonal to what is there. What is carried on is the
unscaled sum Z_t = lambda_t (theta_t - theta_0), in fp32: its singular vectors are those of the merged task
vector, so that all models of a matrix are done in one visit, and the last scale alone needs all tensors.
Where the merged change has no full rank (a LoRA's), the diagonal is cleared within its rank: beyond it the
singular vectors are not determined, and the outcome would hang on rounding.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._base import Block, MergeMethod, Models, TensorInfo, register_merge, setting
from ._reductions import chunk_dots
from ._running_sum import RunningSum, read_running_sum, write_running_sum

__all__ = ["Opcm"]

_FOLDER = "opcm"
_ROUNDING = 1e-6  # share of the largest singular value below which one is rounding of fp32
_SMALL = 64  # smaller sides up to it are decomposed in fp64
# Weights of two dimensions that are tables of vectors rather than linear maps, and heads onto vocabularies.
_NOT_LINEAR = (
    "*embed*", "*wte.weight", "*wpe.weight", "*lm_head.weight", "*relative_attention_bias.weight",
)  # fmt: skip


@register_merge(
    "opcm",
    summary="models merged one after another, each projected off what is there; more can be added later",
    paper="arXiv:2501.09522",
    supports={"one_parent"},
    bad_kwargs=({"alpha": 1.0}, {"alpha": -0.1}, {"drop_cross": "yes"}, {"matrices": "*"}, {"keep_state": 1}),
)
@dataclass(frozen=True, kw_only=True)
class Opcm(MergeMethod):
    """theta_t = theta_0 + Z_t / lambda_t with Z_t = Z_{t-1} + C_t, C_t what is new in model t's task vector.

    lambda_t is such that the merged task vector has the mean norm of all task vectors. Models come in the
    order in which they are given.

    Args:
        alpha: Share of the spectrum of the merged task vector that counts as taken, in [0, 1).
        drop_cross: Whether a new model may not touch the taken rows and columns at all.
        matrices: Patterns of the names of linear layers' weights, which are projected; others are added.
            Empty for all matrices but embeddings and language-model heads.
        include_conv: Whether kernels of convolutions are projected too, as (out, rest) matrices.
        keep_state: Whether the output carries what a later merge adds to, in the folder `opcm`: the sum Z in
            fp32, the size of the model.
        continue_from: Folder of an earlier merge with `keep_state`; the models given are added to its.
    """

    granularity = "matrix"
    one_by_one = True
    operands = "task_vectors"
    needs_base = True
    base_is_parent = False
    spaces = frozenset({"full", "product", "merge_into_base"})

    alpha: float = setting(0.5, rule="at least 0 and below 1", fits=lambda x: 0.0 <= x < 1.0)
    drop_cross: bool = False
    matrices: list[str] = field(default_factory=list)
    include_conv: bool = False
    keep_state: bool = False
    continue_from: str = ""

    @property
    def scans(self) -> int:
        return 1

    @property
    def local(self) -> bool:
        return False  # the last scale is that of the whole model

    def check_models(self, models: Models) -> None:
        if self.continue_from:
            self._earlier().check_tensors(models.tensors)

    def _earlier(self) -> RunningSum:
        return read_running_sum(Path(self.continue_from) / _FOLDER, "continue_from")

    def _is_matrix(self, tensor: TensorInfo) -> bool:
        dimensions = len(tensor.shape)
        if dimensions < 2 or (dimensions > 2 and not self.include_conv) or 0 in tensor.shape:
            return False
        if self.matrices:
            return any(fnmatch.fnmatchcase(tensor.name, pattern) for pattern in self.matrices)
        return not any(fnmatch.fnmatchcase(tensor.name, pattern) for pattern in _NOT_LINEAR)

    def scan(self, number: int, block: Block) -> Any:
        digest = None
        if block.base is not None:
            if not bool(torch.isfinite(block.base).all()):
                raise ValueError("NaN or infinite values in the base")
            digest = hashlib.sha256(block.base.contiguous().numpy().data).hexdigest()
        total = None
        if self.continue_from:
            total = self._earlier().read(block.tensor.name, digest)
        squares: list[list[float]] = []
        for label, change in zip(block.tensor.labels, block.operands, strict=True):
            if not bool(torch.isfinite(change).all()):
                raise ValueError(f"NaN or infinite values in {label}, or in the base")
            squares.append(chunk_dots(change.reshape(-1), change.reshape(-1)))
            if total is None:
                total = change.clone()
            elif self._is_matrix(block.tensor):
                new = novelty(
                    total.flatten(1), change.flatten(1), block.value("alpha"), drop_cross=self.drop_cross
                )
                total = total + new.view(total.shape)
            else:
                total = total + change
        assert total is not None
        block.keep("sum", total)
        return digest, chunk_dots(total.reshape(-1), total.reshape(-1)), squares, str(block.scratch)

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        digest, square, squares, scratch = part
        kept = total or {"bases": {}, "square": [], "squares": [[] for _ in squares], "scratch": scratch}
        kept["bases"][block.tensor.name] = digest
        kept["square"] += square
        for sums, more in zip(kept["squares"], squares, strict=True):
            sums += more
        return kept

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        if total is None:  # no tensor is merged
            return {"lambda": 1.0, "norms": [], "bases": {}, "models": [], "shapes": {}, "scratch": ""}
        earlier = self._earlier() if self.continue_from else None
        added = [math.sqrt(math.fsum(sums)) for sums in total["squares"]]
        labels = list(tensors[0].labels)
        for label, norm in zip(labels, added, strict=True):
            if norm == 0.0:
                warnings.warn(f"{label} equals the base: it shortens the merged change alone", stacklevel=2)
        norms = [*(earlier.norms if earlier else []), *added]
        length = math.sqrt(math.fsum(total["square"]))
        wanted = math.fsum(norms) / len(norms)
        return {
            "lambda": length / wanted if length > 0.0 and wanted > 0.0 else 1.0,
            "norms": norms,
            "models": [*(earlier.models if earlier else []), *labels],
            "bases": total["bases"],
            "shapes": {tensor.name: [tensor.index, list(tensor.shape)] for tensor in tensors},
            "scratch": total["scratch"],
        }

    def map(self, block: Block) -> Tensor:
        return block.kept("sum").div_(block.states[0]["lambda"])

    def extra_files(self, states: Sequence[Any]) -> Mapping[str, object]:
        (state,) = states
        scalars = {"lambda": state["lambda"], "norms": state["norms"], "models": state["models"]}
        if not self.keep_state or not state["shapes"]:
            return {f"{_FOLDER}/scalars.json": scalars}
        # The sums lie beside the unfinished model; they are copied, one at a time.
        scratch = Path(state["scratch"])
        kept = {name: scratch / f"{index}-0-sum" for name, (index, _) in state["shapes"].items()}
        write_running_sum(scratch.parent / "model" / _FOLDER, kept, scalars, state["bases"])
        return {}


def taken(spectrum: Tensor, alpha: float) -> int:
    """Return how many leading singular values make up the share alpha of their sum; the next exceeds it.

    Args:
        spectrum: (k,), falling, not all zero.
        alpha: Share in [0, 1).
    """
    shares = spectrum.double().cumsum(0)
    return min(int((shares <= alpha * shares[-1]).sum()), len(spectrum) - 1)


def novelty(merged: Tensor, change: Tensor, alpha: float, *, drop_cross: bool = False) -> Tensor:
    """Return what a task vector has beside the directions of the merged one, in fp32.

    Args:
        merged: (m, n); its scale does not matter.
        change: (m, n).
        alpha: Share of the merged one's spectrum that counts as taken.
        drop_cross: Whether to clear the taken rows and columns rather than the block they share.
    """
    if not bool(merged.any()):
        return change
    kind = torch.float64 if min(merged.shape) <= _SMALL else torch.float32
    u, s, vh = torch.linalg.svd(merged.to(kind), full_matrices=False)  # (m, k), (k,), (k, n)
    rest = change.to(kind)
    r = taken(s, alpha)
    diagonal = ((u.T @ rest) * vh).sum(dim=1)  # (k,), u_i^T T v_i
    diagonal[:r] = 0.0
    diagonal[s <= _ROUNDING * s[0]] = 0.0  # which vectors belong to singular values of 0 is chance
    left, right = u[:, :r], vh[:r]
    new = rest - (u * diagonal) @ vh
    if drop_cross:
        new -= left @ (left.T @ new)
        new -= (new @ right.T) @ right
    else:
        new -= left @ ((left.T @ rest) @ right.T) @ right
    return new.float()
