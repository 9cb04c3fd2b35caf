"""EVA, slow and plain: the inputs of every layer are stored, and each is decomposed by a full SVD in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Pca:
    """Principal components of X (N, d): rows v_i, singular values s_i, shares e_i of the variance."""

    v: Tensor
    s: Tensor
    e: Tensor


def pca(x: Tensor) -> Pca:
    """Decompose rows x (N, d)."""
    centred = x.double() - x.double().mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    for row in v:  # the largest entry of each component is positive
        if row[row.abs().argmax()] < 0:
            row.neg_()
    total = s.square().sum()
    return Pca(v, s, s.square() / total if total > 0 else torch.zeros_like(s))


def inputs_of(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Any]],
    masks: Iterable[Tensor | None],
) -> dict[str, Tensor]:
    """Return the rows (N, d) that reach each layer of a plain model, without positions that are masked out.

    Args:
        model: The base model.
        names: Paths of its layers.
        batches: Model inputs.
        masks: For each batch its (batch, length) positions that count; None for all.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    now: list[Tensor | None] = [None]

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            rows[name].append(x.reshape(-1, x.shape[-1]) if now[0] is None else x[now[0]])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in rows]
    model.eval()
    with torch.no_grad():
        for batch, mask in zip(batches, masks, strict=True):
            now[0] = mask
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items() if parts}


def redistribute(
    shares: Mapping[str, list[float]], ranks: Mapping[str, int], min_rank: int = 0
) -> dict[str, int]:
    """Give the budget out one component at a time, always to the layer whose next one explains most."""
    counts = {name: min(min_rank, len(shares[name])) for name in ranks}
    while sum(counts.values()) < sum(ranks.values()):
        open_layers = [name for name in ranks if counts[name] < len(shares[name])]
        if not open_layers:
            break
        best = open_layers[0]
        for name in open_layers:
            if shares[name][counts[name]] > shares[best][counts[best]]:
                best = name
        counts[best] += 1
    return counts


def start(
    inputs: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    *,
    rho: float,
    whiten: bool = False,
    min_rank: int = 0,
) -> dict[str, Tensor]:
    """Return A of every layer, (r', d), r' from 0 to rho r."""
    found = {name: pca(inputs[name]) for name in ranks}
    shares = {name: found[name].e[: round(rho * ranks[name])].tolist() for name in ranks}
    counts = redistribute(shares, ranks, min_rank)
    rows = {name: found[name].v[: counts[name]] for name in ranks}
    if whiten:
        rows = {name: a / found[name].s[: len(a), None].sqrt() for name, a in rows.items()}
    return rows
