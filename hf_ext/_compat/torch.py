"""PyTorch's operators without a stability promise, checked on 2.13."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rows_times_transposed"]


def rows_times_transposed(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows @ matrix.T, for few rows.

    On a CPU in fp32 it goes to oneDNN, by the operator that torch.compile emits for a linear layer: where
    torch's own product calls MKL and the processor is not Intel's, that takes 0.2 to 0.6 of the time. Both
    are fp32 throughout. A matrix whose rows are contiguous is read as the operator's input, and the rows as
    its weight: 0.7 of the time of the other way round.

    Args:
        rows: (k, n).
        matrix: (m, n), of the same dtype and device; itself or its transpose contiguous.

    Returns:
        (k, m); any strides.
    """
    fast = rows.device.type == matrix.device.type == "cpu" and rows.dtype == matrix.dtype == torch.float32
    if not (fast and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return rows @ matrix.T
    if matrix.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(matrix, rows, None, "none", [], "").T
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")
