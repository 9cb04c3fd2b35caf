"""Running statistics of batch norms: which a model has, and how to take them anew from data.

Averaged weights need statistics of their own: those of the averaged models belong to other activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import dist
from .checks import check

MEAN, VARIANCE = "running_mean", "running_var"
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return by name the batch norms of a model that keep running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _KINDS) and module.running_mean is not None
    }


def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object] | None = None
) -> int:
    """Set running mean and variance of each batch norm to those of its inputs over some batches.

    The model runs without gradients and in evaluation mode, its batch norms alone in training mode, where
    they normalize by each batch. Means and variances are those over all elements of all batches (unbiased),
    whatever the sizes of the batches; with several processes over those of all of them (a collective).
    `torch.optim.swa_utils.update_bn` averages the batches' variances instead and leaves out how far their
    means lie apart. Modes come back; after an exception the statistics do too. Without batch norms nothing is
    done, and no batch is taken.

    Args:
        model: The model, in place.
        batches: Inputs: mappings, which the model gets as keywords, or anything else, which it gets as it is.
        forward: What to call with a batch in place of that.

    Returns:
        The number of batch norms.

    Raises:
        ValueError: A batch norm saw fewer than two values of a channel.
    """
    norms = batch_norms(model)
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    before = {name: _statistics(norm) for name, norm in norms.items()}
    found = {name: _Moments(norm) for name, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(found[name]) for name, norm in norms.items()]
    try:
        model.eval()
        for norm in norms.values():
            norm.train()
            norm.reset_running_stats()
        with torch.no_grad():
            for batch in batches:
                if forward is not None:
                    forward(batch)
                elif isinstance(batch, dict):
                    model(**batch)
                else:
                    model(batch)
        for name in norms:
            found[name].write(name)
    except BaseException:
        for name, norm in norms.items():
            for key, value in before[name].items():
                cast(Tensor, getattr(norm, key)).copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return len(norms)


def _statistics(norm: BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers(recurse=False)}


class _Moments:
    """Count, mean and sum of squared deviations of a batch norm's inputs, by channel."""

    def __init__(self, norm: BatchNorm) -> None:
        assert norm.running_mean is not None
        self.norm = norm
        self.count = 0
        kind = torch.float32 if norm.running_mean.device.type == "mps" else torch.float64
        self.mean = torch.zeros_like(norm.running_mean, dtype=kind)
        self.squares = torch.zeros_like(self.mean)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        others = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values, dim=others, correction=0)
        count = values.numel() // values.shape[1] if values.numel() else 0
        if not count:
            return
        total = self.count + count
        away = mean.to(self.mean.dtype) - self.mean
        self.squares += variance.to(self.mean.dtype) * count + away**2 * (self.count * count / total)
        self.mean += away * (count / total)
        self.count = total

    def write(self, name: str) -> None:
        count = dist.all_reduce_sum_(torch.full_like(self.mean[:1], self.count))
        total = float(count)
        check(total >= 2, "batches", int(total), "of two values of a channel at least", where=name)
        mean = dist.all_reduce_sum_(self.mean * self.count) / total
        squares = dist.all_reduce_sum_(self.squares + self.count * (self.mean - mean) ** 2)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(squares / (total - 1))
