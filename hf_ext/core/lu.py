"""LU factors of a matrix in fp64 on the CPU: the first few of them, or those that carry most.

With partial pivoting, P^T W = L D U: L (m, k) unit lower triangular with entries up to 1, D (k,) the pivots,
U (k, n) unit upper triangular, k = min(m, n). Elimination goes from left to right, so its first r steps give
the first r columns of L and rows of U. Done lazily ("left-looking", Golub and Van Loan, "Matrix
Computations", chapter 3), step i computes the one column that its pivot is sought in and the one row that the
pivot lies in: (m + n) r^2 operations in all, where the full factorization takes 2/3 n^3 of a square matrix.

A column with nothing left above 1e-12 of the matrix's largest entry counts as zero: dividing by what rounding
has left would give noise. D is 1 there, the row of U stays as it is (with a 0 on its diagonal), and L D U is
still the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check, check_choice

TINY = 1e-12  # pivots up to this times the largest entry count as zero


@dataclass(frozen=True)
class LUFactors:
    """Terms l[:, i] d[i] u[i] of a factorization, fp64 on the CPU.

    Args:
        l: P L, (m, r): columns in the matrix's own row order.
        d: Pivots, (r,).
        u: Rows of U, (r, n).
        pivots: Row of the matrix in which each pivot lies, (r,), int64.
    """

    l: Tensor  # noqa: E741 (the factor's name)
    d: Tensor
    u: Tensor
    pivots: Tensor


def truncated_lu(
    weight: Tensor, r: int, *, selection: str = "leading", pivots: Tensor | None = None, name: str = ""
) -> LUFactors:
    """Return r terms of the LU factorization with partial pivoting.

    Equal arguments give equal results on one machine. Another machine's linear algebra may sum in another
    order: the last bits then differ, and where two candidates for a pivot agree to those, so may the pivot
    and all that follows. With `pivots` from an earlier factorization only the last bits do.

    Args:
        weight: (m, n), any floating dtype and device.
        r: Number of terms, 1 <= r <= min(m, n).
        selection: "leading" for the first r in order of elimination; "largest" for those of largest
            ||l_i|| |d_i| ||u_i||, which takes the full factorization.
        pivots: Rows to take the pivots from, (r,), integers, each row once; None to search each column for
            its largest entry. Only for "leading".
        name: Module path, for error texts.

    Raises:
        ValueError: A setting is outside its range, or the matrix is not finite.
    """
    check(weight.dim() == 2, "weight", tuple(weight.shape), "a matrix", where=name)
    m, n = weight.shape
    limit = min(m, n)
    check(1 <= r <= limit, "r", r, f"between 1 and {limit}, the layer's smaller side", where=name)
    check_choice("selection", selection, ("leading", "largest"))
    matrix = weight.detach().cpu()
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    largest = max(abs(low), abs(high))
    check(largest < float("inf"), "weight", "NaN or infinite values", "finite", where=name)  # false for NaN
    if selection == "largest":
        check(pivots is None, "pivots", pivots, 'None with selection="largest"', where=name)
        return _largest(matrix.double(), r, TINY * largest)
    rows = None if pivots is None else [int(row) for row in pivots]
    if rows is not None:
        valid = len(rows) == len(set(rows)) == r and min(rows) >= 0 and max(rows) < m
        check(valid, "pivots", rows, f"{r} different rows below {m}", where=name)
    return _leading(matrix, r, TINY * largest, rows)


def _leading(matrix: Tensor, r: int, tiny: float, rows: list[int] | None) -> LUFactors:
    m, n = matrix.shape
    columns = matrix[:, :r].T.double().contiguous()  # (r, m)
    lower = columns.new_zeros(r, m)  # L by columns: what is read together lies together
    upper = columns.new_zeros(r, n)  # D U, divided at the end
    d = columns.new_ones(r)
    # LAPACK swaps rows and takes the first of equal candidates: the order of those not used up yet decides.
    order = torch.arange(m)
    for i in range(r):
        column = columns[i] - upper[:i, i] @ lower[:i]  # (m,)
        candidates = column[order[i:]]
        place = int(candidates.abs().argmax())
        nothing_left = float(candidates[place].abs()) <= tiny
        if rows is not None:
            place = int((order[i:] == rows[i]).nonzero())
        elif nothing_left:
            place = 0
        row = int(order[i + place])
        order[i + place], order[i] = int(order[i]), row
        rest = matrix[row].double() - lower[:i, row] @ upper[:i]  # (n,)
        if nothing_left:
            rest[rest.abs() <= tiny] = 0.0
        else:
            d[i] = column[row]
            lower[i, order[i:]] = column[order[i:]] / d[i]
            upper[i, i] = d[i]
        lower[i, row] = 1.0
        upper[i, i + 1 :] = rest[i + 1 :]
    return LUFactors(lower.T.contiguous(), d, upper / d[:, None], order[:r].clone())


def _largest(matrix: Tensor, r: int, tiny: float) -> LUFactors:
    m, n = matrix.shape
    k = min(m, n)
    packed, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    order = torch.arange(m)
    for i, other in enumerate((swaps - 1).tolist()):
        order[i], order[other] = int(order[other]), int(order[i])
    upper, lower = packed[:k].triu(), packed[:, :k].tril(-1)
    size = (1.0 + lower.square().sum(0)).sqrt() * upper.norm(dim=1)  # ||l_i|| |d_i| ||u_i||, (k,)
    chosen = size.argsort(descending=True, stable=True)[:r].sort().values
    d = upper[chosen, chosen]
    zero = d.abs() <= tiny
    d = torch.where(zero, 1.0, d)
    u = upper[chosen] / d[:, None]
    u[torch.arange(r), chosen] = torch.where(zero, 0.0, 1.0).double()
    l = torch.zeros(m, r, dtype=torch.float64)  # noqa: E741
    l[order] = lower[:, chosen]
    l[order[chosen], torch.arange(r)] = 1.0
    return LUFactors(l, d, u, order[chosen])
