"""The best small basis of a few vectors in least squares, for many places at once, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

_ZERO = 1e-14  # share of the largest eigenvalue below which one is rounding


def leading_basis(vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases and coefficients whose products are nearest to the vectors.

    With X = U diag(s) V^T the basis is U[:, :p] and the coefficients are diag(s[:p]) V[:, :p]^T; the squared
    error is the sum of the s_k^2 that are left out (Eckart and Young). Directions that the vectors do not
    have are zero in both.

    Args:
        vectors: (places, d, n), n vectors of length d at each place.
        size: Number of basis vectors p, 1 <= p <= min(d, n).

    Returns:
        (places, d, p) and (places, p, n), fp64.
    """
    x = vectors.double()
    _, d, n = x.shape
    if d < n:
        _, u = torch.linalg.eigh(x @ x.mT)  # (places, d, d), eigenvalues rise
        basis = u.flip(-1)[..., :size]
        return basis, basis.mT @ x
    values, v = torch.linalg.eigh(x.mT @ x)
    values, v = (
        values.flip(-1)[..., :size].clamp(min=0.0),
        v.flip(-1)[..., :size],
    )  # (places, p), (places, n, p)
    present = values > _ZERO * values[..., :1]
    roots = torch.where(present, values, 1.0).sqrt()
    basis = torch.where(present[..., None, :], x @ v / roots[..., None, :], 0.0)
    coefficients = torch.where(present[..., :, None], roots[..., :, None] * v.mT, 0.0)
    return basis, coefficients


def energies(vectors: Tensor) -> Tensor:
    """Return the squared singular values, falling and summed over the places, (min(d, n),) in fp64.

    Args:
        vectors: (places, d, n).
    """
    x = vectors.double()
    gram = x.mT @ x if x.shape[2] <= x.shape[1] else x @ x.mT
    return torch.linalg.eigvalsh(gram).clamp(min=0.0).sum(dim=0).flip(0)


def fitted(basis: Tensor, vectors: Tensor) -> Tensor:
    """Return the coefficients of vectors in a basis that is orthonormal but for rounding, or has zeros.

    Args:
        basis: (places, d, p).
        vectors: (places, d, n).

    Returns:
        (places, p, n), fp64.
    """
    return torch.linalg.pinv(basis.double(), rtol=1e-6) @ vectors.double()


def aligned(a: Tensor, b: Tensor, first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return factors of the same product B A, nearest to those of another (orthogonal Procrustes).

    Args:
        a: (r, in_features).
        b: (out_features, r).
        first: A and B to come near to, of the same shapes.
    """
    m = a.double() @ first[0].double().T + b.double().T @ first[1].double()  # (r, r)
    u, _, vh = torch.linalg.svd(m)
    turn = u @ vh
    return turn.T @ a.double(), b.double() @ turn


def product_error(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> float:
    """Return |B' A' - B A| / |B A| in the Frobenius norm without forming the products; 0 where both are 0.

    Args:
        a: (r, in_features).
        b: (out_features, r).
        a_hat: A', of the same shape.
        b_hat: B', of the same shape.
    """
    a, b, a_hat, b_hat = (value.double() for value in (a, b, a_hat, b_hat))
    # B' A' - B A = (B' - B) A' + B (A' - A): no difference of large numbers.
    left, right = torch.cat([b_hat - b, b], dim=1), torch.cat([a_hat, a_hat - a])
    wrong = float(((left.T @ left) * (right @ right.T)).sum())
    whole = float(((b.T @ b) * (a @ a.T)).sum())
    return (max(0.0, wrong) / whole) ** 0.5 if whole > 0.0 else 0.0
