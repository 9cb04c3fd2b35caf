"""Sparse soups in plain lists: masks by sorting, means by adding."""

from __future__ import annotations


def mask(
    weights: dict[str, list[float]], sparsity: float, previous: dict[str, list[bool]]
) -> dict[str, list[bool]]:
    """Return which weights one threshold over all tensors keeps.

    Args:
        weights: Values by name.
        sparsity: Share of zeros.
        previous: Earlier masks, or nothing.
    """
    entries = [(name, i, value) for name in sorted(weights) for i, value in enumerate(weights[name])]
    keep = round((1 - sparsity) * len(entries))
    free = [(name, i, value) for name, i, value in entries if not previous or previous[name][i]]
    free.sort(key=lambda entry: -abs(entry[2]))  # stable: equal ones stay in order
    kept = {(name, i) for name, i, _ in free[:keep]}
    return {name: [(name, i) in kept for i in range(len(values))] for name, values in weights.items()}


def mean(models: list[list[float]], weights: list[float]) -> list[float]:
    """Return the weighted mean of each entry."""
    total = sum(weights)
    return [
        sum(w * v for w, v in zip(weights, values, strict=True)) / total
        for values in zip(*models, strict=True)
    ]
