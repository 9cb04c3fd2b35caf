"""The noise of a batch's gradient, measured from the gradients of its micro-batches.

Source: Lau, Liu and Kolar 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", arXiv
2402.11215, after Byrd et al. 2012 and Bollapragada et al. 2018. With g_i the gradient of sample i and g their
mean over the batch's B samples:

V1 = sum_i |g_i - g|^2 / (B - 1), V2 = sum_i (<g_i, g> - |g|^2)^2 / (B - 1),
V3 = sum_i |g_i - <g_i, g> g / |g|^2|^2 / (B - 1) = V1 - V2 / |g|^2.

Differs from the paper: nobody has the gradients of single samples here. M micro-batches with shares p_m of
the batch's loss and gradients g_m add c_m = p_m g_m to the gradient, g = sum_m c_m, and the variance of g_m
is that of a sample over the samples of its share:

V1 = B / (M - 1) (sum_m |c_m|^2 / p_m - |g|^2), V2 = B / (M - 1) (sum_m <c_m, g>^2 / p_m - |g|^4).

The shares are those of the loss (in tokens, where the loss is a mean over tokens), so that a micro-batch with
few tokens does not pass for noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.devices import stacked

KEPT = 8  # gradients that are kept for inner products
CHUNK = 1 << 24  # elements of one collective


@dataclass(frozen=True)
class Noise:
    """Statistics of a batch's gradient.

    Args:
        squared_norm: |g|^2, float.
        variance: V1.
        along: V2; None where it was not measured.
        tensor_norms: (P,) |g|^2 of each parameter tensor, float64.
        tensor_variances: (P,) V1 of each parameter tensor, float64.
    """

    squared_norm: float
    variance: float
    along: float | None
    tensor_norms: Tensor
    tensor_variances: Tensor

    @property
    def across(self) -> float | None:
        """V3, the variance at right angles to g; None where V2 was not measured."""
        return None if self.along is None else max(0.0, self.variance - self.along / self.squared_norm)

    @property
    def usable(self) -> bool:
        """Whether there is a gradient, and all statistics are finite."""
        values = (self.squared_norm, self.variance, self.along or 0.0)
        return self.squared_norm > 0.0 and all(map(math.isfinite, values))


def statistics(
    squares: Tensor, mean_squares: Tensor, micro_batches: int, samples: int, products: float | None = None
) -> Noise:
    """Return the statistics from sums over micro-batches.

    Args:
        squares: (P,) sum_m |c_m|^2 / p_m of each parameter tensor.
        mean_squares: (P,) |g|^2 of each parameter tensor.
        micro_batches: M, at least 2.
        samples: B.
        products: sum_m <c_m, g>^2 / p_m, or None.
    """
    check(micro_batches >= 2, "micro_batches", micro_batches, "at least 2")
    factor = samples / (micro_batches - 1)
    norm = float(mean_squares.sum())
    # Differences of nearly equal sums: rounding can make them negative.
    return Noise(
        squared_norm=norm,
        variance=max(0.0, factor * float((squares - mean_squares).sum())),
        along=None if products is None else max(0.0, factor * (products - norm**2)),
        tensor_norms=mean_squares,
        tensor_variances=(factor * (squares - mean_squares)).clamp(min=0.0),
    )


class NoiseMeter:
    """Measures the noise over the backward passes of one update.

    Each micro-batch goes between `set_aside` and `take`; the accumulated gradients are those that they would
    have been without the meter, to the bit. `reduce` and `finish` come after the last.

    Costs one more buffer of the gradients' size, and `KEPT` of them where inner products are asked for.

    Args:
        parameters: Those that are trained.
        sharded: Whether a backward leaves shards of the mean gradient over the processes (FSDP2); else it
            leaves each process its own gradient.
        micro_batches: Those to come on this process.
        products: Whether inner products with the mean are wanted; then at most `KEPT` groups of
            micro-batches take the place of these.
        divisor: Given a parameter, what squares are divided by elementwise, or None.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        sharded: bool,
        micro_batches: int,
        products: bool = False,
        divisor: Callable[[nn.Parameter], Tensor] | None = None,
    ) -> None:
        self._parameters, self._sharded, self._divisor = list(parameters), sharded, divisor
        self._expected, self._products = micro_batches, products
        self._groups = min(micro_batches, KEPT)
        self._kept: list[list[Tensor | None]] = []
        self._shares: list[float] = []
        self._held: list[Tensor | None] = []
        self._measured: list[tuple[_Squares, float]] = []  # with shares
        self._seen = 0

    def set_aside(self) -> None:
        """Take what has been accumulated out of the way of the next backward."""
        self._held = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None

    def take(self, share: float) -> None:
        """Measure what a backward has left, and add it to what had been accumulated.

        Args:
            share: p_m, the micro-batch's share of the whole batch's loss; 0 for one without any item.
        """
        found = [parameter.grad for parameter in self._parameters]
        group = self._seen * self._groups // self._expected
        self._seen += 1
        if share > 0.0:
            if self._products:
                self._keep(group, found, share)
            else:
                self._measured.append((self._squares_of(found), share))
        sums: list[Tensor] = []
        added: list[Tensor] = []
        for parameter, held, new in zip(self._parameters, self._held, found, strict=True):
            if held is not None:
                parameter.grad = held
                if new is not None:
                    sums.append(held)
                    added.append(new)
        if sums:
            torch._foreach_add_(self._locals(sums), self._locals(added))  # pyright: ignore[reportPrivateImportUsage]
        self._held = []

    def _keep(self, group: int, found: list[Tensor | None], share: float) -> None:
        while len(self._kept) <= group:
            self._kept.append([None] * len(self._parameters))
            self._shares.append(0.0)
        self._shares[group] += share
        kept = self._kept[group]
        for index, new in enumerate(found):
            if new is not None:
                old = kept[index]
                kept[index] = new.clone() if old is None else old.add_(new)

    def reduce(self) -> None:
        """Give every process the mean of the gradients, as an ordinary update does (a collective)."""
        if self._sharded or not dist.is_distributed():
            return
        present = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.float32)
        device = self._parameters[0].device
        anywhere = dist.all_reduce_sum_(present.to(device)).cpu() > 0
        gradients: list[Tensor] = []
        for parameter, used in zip(self._parameters, anywhere.tolist(), strict=True):
            if used:
                if parameter.grad is None:  # another process has used it
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for part in _chunks(gradients):
            flat = dist.all_reduce_mean_(torch.cat([gradient.reshape(-1) for gradient in part]))
            for gradient, mean in zip(part, flat.split([g.numel() for g in part]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def finish(self, samples: int) -> Noise | None:
        """Return the statistics, equal on all processes, or None with too few micro-batches (a collective).

        Args:
            samples: B, of all processes.
        """
        mean = [parameter.grad for parameter in self._parameters]
        products = torch.zeros(1, dtype=torch.float64)
        for kept, share in zip(self._kept, self._shares, strict=True):
            if share > 0.0:
                self._measured.append((self._squares_of(kept), share))
                product = self._local_product(kept, mean)
                products += (self._summed(product) if self._sharded else product) ** 2 / share
        counted = torch.tensor([float(len(self._measured))], dtype=torch.float64)
        copies = self._copies()
        mean_squares = self._squares_of(mean).spread(len(mean)) / copies
        squares = torch.zeros_like(mean_squares)
        for measured, share in self._measured:
            squares += measured.spread(len(mean)) / copies / share
        if self._sharded:
            squares, mean_squares = self._summed(torch.stack([squares, mean_squares])).unbind()
        else:
            # Each process's own gradients are as many times their part of the mean as there are processes.
            world = dist.world_size()
            sums = torch.cat([squares / world**2, products / world**2, counted])
            squares, products, counted = self._summed(sums).split([len(squares), 1, 1])
        if counted.item() < 2:
            return None
        along = float(products) if self._products else None
        return statistics(squares, mean_squares, int(counted.item()), samples, along)

    def _summed(self, values: Tensor) -> Tensor:
        return dist.all_reduce_sum_(values.clone())

    def _squares_of(self, tensors: Sequence[Tensor | None]) -> _Squares:
        """Return squared norms; of this process's shards, where there are shards."""
        there = [index for index, tensor in enumerate(tensors) if tensor is not None]
        if not there:
            return _Squares(there, torch.zeros(0), 1)
        locals_ = self._locals([tensor for tensor in tensors if tensor is not None])
        if self._divisor is None:
            norms = torch._foreach_norm(locals_, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
            return _Squares(there, stacked(norms), 2)
        parts = [
            local.float().square() / self._divided_by(i) for i, local in zip(there, locals_, strict=True)
        ]
        return _Squares(there, stacked([part.sum() for part in parts]), 1)

    def _local_product(self, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
        """Return (1,) the inner product over all tensors, float64; of this process's shards."""
        products = torch.zeros(len(a), dtype=torch.float64)
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            if left is not None and right is not None:
                product = self._local(left).float() * self._local(right).float()
                products[index] = (product / self._divided_by(index)).sum().double().cpu()
        return (products / self._copies()).sum().reshape(1)

    def _divided_by(self, index: int) -> Tensor | float:
        return 1.0 if self._divisor is None else self._local(self._divisor(self._parameters[index]))

    def _locals(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._local(tensor) for tensor in tensors] if self._sharded else tensors

    @staticmethod
    def _local(tensor: Any) -> Tensor:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def _copies(self) -> Tensor:
        """Return (P,) how many processes hold the same shard; a sum over processes counts it as often."""
        if not self._sharded:
            return torch.ones(len(self._parameters), dtype=torch.float64)
        return torch.tensor([float(_copies(p)) for p in self._parameters], dtype=torch.float64)


@dataclass(frozen=True)
class _Squares:
    """Squared norms of some of the tensors, as they lie on the device: no backward waits for a copy of them.

    Args:
        there: Indices of the tensors that there are.
        values: fp32, one for each of them.
        power: What the values are to be raised to.
    """

    there: list[int]
    values: Tensor
    power: int

    def spread(self, count: int) -> Tensor:
        """Return (count,) the squares of all tensors on the CPU, float64; 0 for those that there are not."""
        values = self.values.cpu().double() ** self.power
        if len(self.there) == count:
            return values
        squares = torch.zeros(count, dtype=torch.float64)
        squares[self.there] = values
        return squares


def _copies(parameter: Any) -> int:
    if not hasattr(parameter, "device_mesh"):
        return dist.world_size()
    mesh = parameter.device_mesh
    return math.prod(mesh.size(dim) for dim, place in enumerate(parameter.placements) if not place.is_shard())


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype in lists of up to CHUNK elements, in an order that all processes share."""
    part: list[Tensor] = []
    for tensor in tensors:
        size = sum(other.numel() for other in part)
        if part and (part[0].dtype != tensor.dtype or size + tensor.numel() > CHUNK):
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


def adam_divisor(optimizer: Any) -> Callable[[nn.Parameter], Tensor] | None:
    """Return sqrt(v_hat) + eps of a parameter by Adam's second moment; None before the first step of all.

    Infinite where one parameter has none yet, since nothing has used it: such a one is not measured.

    Args:
        optimizer: Of torch, outside Accelerate's wrapper.

    Raises:
        ValueError: It keeps no second moment of each parameter under torch's names.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if not any(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]):
        return None

    def divisor(parameter: nn.Parameter) -> Tensor:
        group, state = groups[id(parameter)], optimizer.state.get(parameter, {})
        if not state:
            return torch.tensor(math.inf, device=parameter.device)
        if "exp_avg_sq" not in state or "betas" not in group:
            name = type(optimizer).__name__
            raise ValueError(f"metric='preconditioned' needs Adam's second moments, which {name} lacks")
        correction = 1.0 - group["betas"][1] ** float(state["step"])
        return (state["exp_avg_sq"].float() / correction).sqrt() + group["eps"]

    return divisor
