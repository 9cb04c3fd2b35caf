"""LoRA-GA, slow and plain: weights get their gradient from autograd, and a full SVD in fp64 decomposes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def mean_gradients(
    model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Any]], ignored: int = -100
) -> dict[str, Tensor]:
    """Return each layer's gradient G (m, n) of the mean loss over all tokens of all batches, fp64.

    Args:
        model: A plain causal language model, in evaluation mode.
        names: Paths of its linear layers.
        batches: Inputs with labels; positions labeled `ignored` do not count.
        ignored: That label.
    """
    parameters = {name: model.get_submodule(name).weight for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    tokens = 0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=ignored, reduction="sum"
        )
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.double()
        tokens += int((labels != ignored).sum())
    return {name: gradient / tokens for name, gradient in total.items()}


def triplets(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, Sigma, V of G = U diag(Sigma) V^T, fp64; each left vector has a positive largest entry."""
    u, sigma, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    v = vh.T.clone()
    for i in range(len(sigma)):
        if u[u[:, i].abs().argmax(), i] < 0:
            u[:, i] *= -1
            v[:, i] *= -1
    return u, sigma, v


def best_of_rank(gradient: Tensor, k: int) -> Tensor:
    """Return the best approximation of G of rank k."""
    u, sigma, v = triplets(gradient)
    return u[:, :k] @ torch.diag(sigma[:k]) @ v[:, :k].T


def start(
    gradient: Tensor,
    weight: Tensor,
    r: int,
    s: float,
    *,
    for_a: Sequence[int],
    for_b: Sequence[int],
    scale: str = "stable",
    gamma: float = 16.0,
) -> tuple[Tensor, Tensor]:
    """Return A0 (r, n) and B0 (m, r) from the singular vectors with the given numbers (from 0), fp64."""
    u, _, v = triplets(gradient)
    a0 = torch.stack([v[:, i] for i in for_a])
    b0 = torch.stack([u[:, i] for i in for_b], dim=1)
    if scale == "stable":
        factor = len(weight) ** 0.25 / gamma**0.5
    elif scale == "unit":
        factor = 1.0
    elif scale == "gd":
        factor = 1.0 / s
    else:
        sigma = torch.linalg.svdvals(weight.double())[:r]
        factor = float((sigma / s).sqrt().mean())
    return factor * a0, factor * b0


class ReferenceLoraGa:
    """One layer y = x (W0 - s B0 A0 + s B A)^T, the residual written out.

    Args:
        weight: W0 (m, n).
        a0: (r, n).
        b0: (m, r).
        s: Scale.
    """

    def __init__(self, weight: Tensor, a0: Tensor, b0: Tensor, s: float) -> None:
        self.residual = weight - s * b0 @ a0
        self.a, self.b, self.s = a0.clone().requires_grad_(), b0.clone().requires_grad_(), s

    def weight(self) -> Tensor:
        """Return the effective weight (m, n)."""
        return self.residual + self.s * self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., n) through the layer."""
        return x @ self.weight().T
