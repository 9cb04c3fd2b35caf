"""Low-rank linear algebra in fp32: truncated SVD by a block Krylov method, and exact recompression.

Source of the SVD: Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate
Singular Value Decomposition", arXiv 1504.05477, algorithm 2, with the space built by block Lanczos steps on
W^T W (Golub and Underwood 1977), fully reorthogonalized: they give the projected W^T W without a further
product. Blocks are smaller than the rank, which buys depth: on a 2048 x 2048 matrix with singular values
1/sqrt(i) and r = 32, ten blocks of 16 leave 3e-4 in the sine of the largest principal angle, where randomized
power iteration with 48 columns and as many products leaves 0.2.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .._compat.torch import rows_times_transposed
from .checks import check, check_choice


@dataclass(frozen=True)
class TruncatedSVD:
    """Leading singular triplets W ~ u diag(s) vh: u (m, r), s (r,) falling, vh (r, n); all fp32."""

    u: Tensor
    s: Tensor
    vh: Tensor


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on a seed and a module path only.

    Drawing on the CPU gives the same numbers on every device and rank, whatever the global seeds are.
    """
    # The CPU generator takes 32 bits of a seed and ignores the rest, so both go through one 32-bit checksum.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def truncated_svd(
    weight: Tensor,
    r: int,
    *,
    oversample: int | None = None,
    n_iter: int = 9,
    seed: int = 0,
    name: str = "",
    driver: str = "auto",
) -> TruncatedSVD:
    """Return the leading r singular triplets of a matrix.

    Signs are fixed (the entry of largest magnitude in each left vector is positive), so the result depends on
    its arguments alone. Whatever the quality of the approximation, u is orthonormal and u^T W = diag(s) vh to
    rounding. The space is that of W^T W in fp32: values below some 1e-4 of the largest are found less well.

    Args:
        weight: (m, n), any floating dtype; computed in fp32 on its device.
        r: Number of triplets, 1 <= r <= min(m, n).
        oversample: Directions sought beyond r, >= 0; None for max(16, r // 4). Three blocks of the Krylov
            space hold r + oversample.
        n_iter: Krylov steps after the first, >= 0; 0 is a plain randomized sketch. Each costs two products of
            W with a block.
        seed: Seed of the starting block.
        name: Module path, mixed into the seed so that equal layers do not share a block.
        driver: "krylov", "exact" (torch.linalg.svd), or "auto": exact where the Krylov space would fill a
            good part of the matrix anyway.

    Raises:
        ValueError: A setting is outside its range, or the matrix is not finite.
    """
    check(weight.dim() == 2, "weight", tuple(weight.shape), "a matrix", where=name)
    m, n = weight.shape
    limit = min(m, n)
    check(1 <= r <= limit, "r", r, f"between 1 and {limit}, the layer's smaller side", where=name)
    check(n_iter >= 0, "n_iter", n_iter, "at least 0")
    check_choice("driver", driver, ("auto", "exact", "krylov"))
    extra = max(16, r // 4) if oversample is None else oversample
    check(extra >= 0, "oversample", extra, "at least 0")
    matrix = weight.detach().float()
    if not (matrix.is_contiguous() or matrix.T.is_contiguous()):
        matrix = matrix.contiguous()  # products with a part of another matrix can be slow

    # Three blocks hold the r + extra directions that are wanted; a smaller block makes a deeper space for the
    # same products, a larger one makes them faster.
    steps = n_iter + 1
    block = -(-(r + extra) // min(3, steps))
    with torch.autocast(matrix.device.type, enabled=False):
        if driver == "exact" or limit <= steps * block or (driver == "auto" and limit <= 2 * steps * block):
            _check_finite(matrix.sum(), matrix, name)
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        else:
            drawn = torch.randn(n, block, generator=seeded(seed, name), dtype=torch.float32)
            start = torch.linalg.qr(drawn.to(matrix.device)).Q.T
            image = rows_times_transposed(start, matrix)
            _check_finite(image, matrix, name)
            factor = 1.0
            if not 1e-15 < float(image.abs().max()) < 1e15:
                # Their squares would leave fp32.
                factor = float(matrix.abs().max()) or 1.0
                matrix = matrix / factor
                image = rows_times_transposed(start, matrix)
            u, s, vh = _block_lanczos(matrix, start, image, r, steps)
            s = s * factor
    u, s, vh = u[:, :r], s[:r], vh[:r]
    sign = 1.0 - 2.0 * (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) < 0).to(u)  # (1, r)
    return TruncatedSVD((u * sign).contiguous(), s.clone(), (vh * sign.T).contiguous())


def _check_finite(made: Tensor, matrix: Tensor, name: str) -> None:
    # What is made of all finite weights is finite (short of overflow), and has fewer numbers to look at.
    finite = bool(torch.isfinite(made).all()) or bool(torch.isfinite(matrix).all())
    check(finite, "weight", "NaN or infinite values", "finite", where=name)


def _block_lanczos(
    matrix: Tensor, start: Tensor, first: Tensor, r: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return r or more leading singular triplets of the matrix restricted to a block Krylov space of W^T W.

    Bases are kept as rows, so that every product reads the matrix along its rows. With V (steps * block, n)
    orthonormal, V W^T W V^T is block tridiagonal, and known from the products that make V.

    Args:
        matrix: W (m, n).
        start: The first block of V (block, n), orthonormal.
        first: Its product with W^T (block, m).
        r: Number of triplets, at most steps * block.
        steps: Number of blocks.
    """
    m, n = matrix.shape
    block = len(start)
    size = steps * block
    right, image = matrix.new_empty(size, n), matrix.new_empty(size, m)  # V, V W^T
    squares = matrix.new_zeros(size, size)  # the lower half of V W^T W V^T
    right[:block], image[:block] = start, first
    scale = 0.0
    for step in range(steps):
        known = (step + 1) * block
        now, near = slice(step * block, known), slice(max(0, step - 1) * block, known)
        if step > 0:
            image[now] = rows_times_transposed(right[now], matrix)
        if known == size:
            squares[now, near] = rows_times_transposed(image[now], image[near])
            break
        back = rows_times_transposed(image[now], matrix.T)  # (block, n)
        along = rows_times_transposed(back, right[near])
        squares[now, near] = along
        rest = back - rows_times_transposed(along, right[near].T)
        right[known : known + block], scale = _new_directions(rest, right[:known], scale)
    # In a few steps no direction has settled: what they have found is all kept until the last product.
    u = torch.linalg.qr(image.T if steps <= 3 else _leading(squares, image, r)).Q
    return _split(u, rows_times_transposed(u.T, matrix.T))


def _leading(squares: Tensor, image: Tensor, r: int) -> Tensor:
    """Return W V^T c (m, r) for the r leading right singular vectors c of W V^T.

    Args:
        squares: V W^T W V^T, of which the lower half is read, (k, k).
        image: V W^T, (k, m).
        r: Number of vectors, at most k.
    """
    values, vectors = torch.linalg.eigh(squares)
    if float(values[-r]) < 1e-3 * float(values[-1]):
        # The squares in fp32 do not tell these apart well enough.
        vectors = torch.linalg.svd(torch.linalg.qr(image.T, mode="r").R).Vh.T.flip(1)
    return rows_times_transposed(vectors[:, -r:].flip(1).T, image.T).T


def _split(u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets of u rows, for u (m, k) orthonormal and rows (k, n)."""
    q, upper = torch.linalg.qr(rows.T)
    a, s, b = torch.linalg.svd(upper.T, full_matrices=False)
    return u @ a, s, b @ q.T


def _new_directions(rows: Tensor, known: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return an orthonormal basis, as rows, of what rows add to known ones, and the largest size met."""
    rows = rows - rows_times_transposed(rows_times_transposed(rows, known), known.T)
    q, upper = torch.linalg.qr(rows.T)
    sizes = upper.diagonal().abs().tolist()
    scale = max(scale, *sizes)
    if min(sizes) <= 1e-4 * scale:
        # Some rows add next to nothing (the rank is reached): what QR made of them lies anywhere.
        for _ in range(2):
            q = torch.linalg.qr(q - known.T @ (known @ q)).Q
    return q.T, scale


def recompress(
    b: Tensor, a: Tensor, *, rank: int | None = None, tol: float = 1e-6
) -> tuple[Tensor, Tensor, float]:
    """Return the smallest factors of the product b @ a, and the share of its energy that was dropped.

    Args:
        b: (m, k).
        a: (k, n).
        rank: Largest rank to keep; None for the numerical rank.
        tol: Singular values up to `tol` times the largest count as zero.

    Returns:
        b' (m, q), a' (q, n) with the singular values split evenly, 1 <= q <= k, and the dropped share of the
        squared Frobenius norm in [0, 1] (0 where only rounding was dropped).
    """
    # In fp64: the product of large factors can be small, and rounding in fp32 is relative to the factors.
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    keep = max(1, int((s > tol * s[0]).sum()))
    kept = keep if rank is None else min(keep, rank)
    energy = s.square()
    dropped = float(energy[kept:keep].sum() / energy.sum()) if kept < keep else 0.0
    root = s[:kept].sqrt()
    left, right = (qb @ u[:, :kept]) * root, root[:, None] * (vh[:kept] @ qa.T)
    return left.float(), right.float(), dropped
