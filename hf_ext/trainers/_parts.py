"""A process's own part of tensors that FSDP2 or ZeRO-3 shards, on the CPU; of any other tensor all of it.

A part of ZeRO-3's is flat, with zeros as padding. Before parts are put back `_snapshots.reshard` has to run.
Arithmetic that is the same for each number works on parts as on the whole. The rest is here: parts of files
and files of parts, sums over a model, and the fp32 copies that DeepSpeed trains in the place of a model's own
tensors where those are of half precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._compat import deepspeed
from ..core import dist
from ..core.checks import check


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(parameter: Tensor) -> Tensor:
    """Return a copy of this process's part of a tensor."""
    if deepspeed.is_split(parameter):
        return deepspeed.own_part(parameter).cpu()
    return _local(parameter.detach()).cpu().clone()


def put_part(parameter: Tensor, part: Tensor) -> None:
    """Overwrite this process's part of a tensor, in place."""
    if deepspeed.is_split(parameter):
        deepspeed.put_part(parameter, part)
        return
    with torch.no_grad():
        _local(parameter.detach()).copy_(part)


def part_of_whole(whole: Tensor, parameter: Tensor, name: str) -> Tensor:
    """Return this process's part of a tensor that is whole on each of them (a collective).

    Args:
        whole: Of the parameter's shape.
        parameter: The tensor whose shards are followed.
        name: Its name, for the error.

    Raises:
        ValueError: The shapes differ.
    """
    shape = deepspeed.whole_shape(parameter)
    check(whole.shape == shape, name, tuple(whole.shape), f"of shape {tuple(shape)}")
    if deepspeed.is_split(parameter):
        return deepspeed.as_part(whole, parameter)
    if not isinstance(parameter, DTensor):
        return whole
    return own_part(dist.shard_like(whole.to(parameter.device), parameter))


def whole_tensor(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole of a tensor, on the CPU, from the processes' parts (a collective)."""
    if deepspeed.is_split(parameter):
        return deepspeed.whole_of_parts(part, parameter).cpu()
    if not isinstance(parameter, DTensor):
        return part
    sharded = DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded.full_tensor().cpu()


def whole_tensors(parts: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors for the first process to write; the others have none of them (a collective).

    Args:
        parts: What `own_part` has returned, by name.
        parameters: The tensors whose parts they are, by the same names.
    """
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        whole = whole_tensor(part, parameters[name])
        if dist.is_main():
            found[name] = whole
    return found


def sum_over_parts(sums: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float:
    """Return the sum over whole tensors of what each process has summed over its parts (a collective).

    Args:
        sums: For each tensor a number, as a 0-dim tensor.
        parameters: The tensors whose parts were summed, by the same names.
    """
    plain, sharded = 0.0, 0.0
    for name, value in sums.items():
        parameter = parameters[name]
        if deepspeed.is_split(parameter):
            sharded += float(value)
        elif isinstance(parameter, DTensor):
            sharded += float(value) / _copies(parameter)
        else:
            plain += float(value)
    if any(deepspeed.is_split(p) or isinstance(p, DTensor) for p in parameters.values()):
        sharded = float(dist.all_reduce_sum_(torch.tensor(sharded, dtype=torch.float64)))
    return plain + sharded


def _copies(parameter: DTensor) -> int:
    """Return how many processes have the same part: shards may be replicated over groups of them."""
    found = 1
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            found *= parameter.device_mesh.size(dimension)
    return found


def fp32_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, on the CPU, what DeepSpeed's optimizer trains for each of some tensors (a collective).

    Args:
        parameters: Tensors of a model that DeepSpeed trains, by name.

    Returns:
        Whole tensors; with stage 3 this process's parts.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        held = deepspeed.fp32_copy(parameter)
        check(held is not None, name, "not trained by DeepSpeed", "one of its optimizer's tensors")
        found[name] = cast(Tensor, held).detach().cpu().clone()
    return found


def put_fp32_copies(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite what DeepSpeed's optimizer trains, whose rounding the tensors themselves must be already.

    Args:
        parameters: As for `fp32_copies`.
        values: What `fp32_copies` returns, by the same names.
    """
    for name, parameter in parameters.items():
        deepspeed.put_fp32_copy(parameter, values[name].to(parameter.device, torch.float32))
