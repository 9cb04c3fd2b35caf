"""Masks of global magnitude pruning, and keeping them while a model is trained.

A mask is True where a weight is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.checks import check, check_choice
from ._threshold import (
    HIGH_BINS,
    LOW_BINS,
    high_histogram,
    locate,
    low_bits,
    low_histogram,
    magnitude_bits,
    non_finite,
    threshold,
)

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name the weights of linear and convolutional layers, without those tied to an embedding."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, _LINEAR) or type(module).__name__ == "Conv1D":
            weight: Any = module.weight
            if id(weight) in names and id(weight) not in tied:
                found[names[id(weight)]] = weight
    return dict(sorted(found.items()))


def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    *,
    previous: Mapping[str, Tensor] | None = None,
    scope: str = "global",
) -> dict[str, Tensor]:
    """Return masks that keep the largest magnitudes.

    Exactly round((1 - sparsity) n) of n weights are kept; among equal magnitudes those that come first, in
    order of the names. A weight that an earlier mask has cut stays cut.

    Args:
        weights: Tensors by name, of any shape.
        sparsity: Share of zeros among all of them, in [0, 1).
        previous: Masks of an earlier phase.
        scope: "global" for one threshold, "uniform" for one of each tensor.

    Returns:
        Boolean masks by name, on the CPU.

    Raises:
        ValueError: A setting is outside its range, a tensor would lose all its weights or has values that are
            not finite, or an earlier mask keeps fewer weights than this sparsity would.
    """
    check(0.0 <= sparsity < 1.0, "sparsity", sparsity, "in [0, 1)")
    check_choice("scope", scope, ("global", "uniform"))
    check(bool(weights), "weights", "none", "at least one tensor")
    names = sorted(weights)
    groups = [names] if scope == "global" else [[name] for name in names]
    masks: dict[str, Tensor] = {}
    for group in groups:
        masks |= _masks({name: weights[name] for name in group}, sparsity, previous or {})
    for name, mask in masks.items():
        check(bool(mask.any()), "sparsity", sparsity, f"lower: {name} would lose all its weights")
    return dict(sorted(masks.items()))


def _masks(
    weights: Mapping[str, Tensor], sparsity: float, previous: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    keep = round((1.0 - sparsity) * sum(value.numel() for value in weights.values()))
    allowed = {
        name: previous[name].flatten() if name in previous else torch.ones(value.numel(), dtype=torch.bool)
        for name, value in weights.items()
    }
    bits: dict[str, Tensor] = {}
    high = torch.zeros(HIGH_BINS, dtype=torch.int64)
    for name, value in weights.items():
        flat = value.detach().to("cpu", torch.float32).flatten().contiguous()
        bits[name] = magnitude_bits(flat)[allowed[name]]
        counts = high_histogram(bits[name])
        if non_finite(counts):
            raise ValueError(f"NaN or infinite values in {name}")
        high += counts
    left = int(high.sum())
    check(keep <= left, "sparsity", sparsity, f"at least that of the earlier masks, which keep {left}")
    if keep == 0:
        return {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in weights.items()}
    upper, rank = locate(high, keep)
    low = torch.zeros(LOW_BINS, dtype=torch.int64)
    for values in bits.values():
        low += low_histogram(low_bits(values, upper))
    cut = threshold(upper, rank, low)
    masks, equal_left = {}, cut.keep_equal
    for name, value in weights.items():
        kept = bits[name] > cut.bits
        equal = (bits[name] == cut.bits).nonzero().flatten()[:equal_left]
        kept[equal] = True
        equal_left -= equal.numel()
        mask = torch.zeros(value.numel(), dtype=torch.bool)
        mask[allowed[name]] = kept
        masks[name] = mask.view(value.shape)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that masks cut to exactly zero.

    Raises:
        ValueError: A mask is of no parameter of the model, or of another shape.
    """
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            check(name in named, "masks", name, "of parameters of the model")
            shape = tuple(named[name].shape)
            check(tuple(mask.shape) == shape, "masks", tuple(mask.shape), f"{shape}", where=name)
            named[name].masked_fill_(~mask.to(named[name].device), 0.0)


@contextlib.contextmanager
def masks_enforced(model: nn.Module, masks: Mapping[str, Tensor]) -> Generator[None]:
    """Keep masked weights at exactly zero: now, and after each step of any torch optimizer within.

    Weights that share memory with the model's are kept too, whatever trainer wraps it. A mixed-precision
    optimizer with master weights of its own is none of torch's; its steps are not seen.

    Raises:
        ValueError: A mask does not fit the model.
    """
    apply_masks(model, masks)
    named = dict(model.named_parameters())
    cut: dict[str, Tensor] = {}

    def zero(*_: object) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = named[name]
                if name not in cut or cut[name].device != parameter.device:
                    cut[name] = ~mask.to(parameter.device)
                parameter.masked_fill_(cut[name], 0.0)

    handle = register_optimizer_step_post_hook(zero)
    try:
        yield
    finally:
        handle.remove()
        apply_masks(model, masks)
