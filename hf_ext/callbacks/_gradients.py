"""Norms of gradients that may be sharded, and those from before the Trainer's clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ..core.devices import stacked


def gradient_norm(gradients: Iterable[Tensor], order: int) -> Tensor:
    """Return the norm of all gradients together (a collective where they are sharded).

    Sums run in fp32 within a tensor and in float64 across tensors. A sharded tensor adds what each process
    holds of it; one that is replicated counts once.

    Args:
        gradients: Tensors of any shape, device and dtype, FSDP2's shards among them.
        order: 1 or 2.

    Returns:
        (), float64, on the gradients' device; 0 without gradients.
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        local, key = _local(gradient)
        by_mesh.setdefault(key, []).append(local)
    total = torch.zeros((), dtype=torch.float64)
    for key in sorted(by_mesh, key=repr):  # one order on every process: each may hold a collective
        total = _add(total, _reduced(_power_sum(by_mesh[key], order), key))
    return total if order == 1 else total.sqrt()


def _add(total: Tensor, part: Tensor) -> Tensor:
    return total.to(part.device) + part


def _local(gradient: Tensor) -> tuple[Tensor, object]:
    if not hasattr(gradient, "full_tensor"):
        return gradient, None
    placements = gradient.placements  # pyright: ignore[reportAttributeAccessIssue]
    if any(placement.is_partial() for placement in placements):
        return gradient.full_tensor(), None  # pyright: ignore[reportAttributeAccessIssue]
    sharded = tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())
    return gradient.to_local(), (gradient.device_mesh, sharded)  # pyright: ignore[reportAttributeAccessIssue]


def _power_sum(tensors: list[Tensor], order: int) -> Tensor:
    # One kernel for all tensors; the public form in nn.utils has no dtype, and bf16 sums have three digits.
    parts = torch._foreach_norm(tensors, order, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    norms = stacked(parts).double()
    return norms.sum() if order == 1 else norms.square().sum()


def _reduced(value: Tensor, key: object) -> Tensor:
    if isinstance(key, tuple):
        mesh, sharded = key
        for dim in sharded:
            torch_dist.all_reduce(value, group=mesh.get_group(dim))
    return value


def steps_in_backward(optimizer: str) -> bool:
    """Return whether an optimizer of this class changes weights within the backward pass.

    Its own `step` does nothing then, and no gradient is there after it.
    """
    return optimizer.startswith("LayerWise") or optimizer in ("Lomo", "AdaLomo")


def before_clipping(norm: Tensor, l2: Tensor, max_grad_norm: float) -> Tensor:
    """Return what a norm of clipped gradients was before `clip_grad_norm_` scaled them.

    Args:
        norm: (), of any order, of the gradients as they are now.
        l2: (), their l2 norm before clipping.
        max_grad_norm: The limit, above 0; at 0 nothing was clipped.
    """
    if max_grad_norm <= 0.0:
        return norm
    return norm / (max_grad_norm / (l2 + 1e-6)).clamp(max=1.0)  # torch's own coefficient
