"""Parameters that DeepSpeed's ZeRO-3 splits, and the end of an engine: internals, checked on 0.19.8.

Stage 3 leaves a parameter empty and keeps beside it this process's part of its numbers: flat, and of one
size on all processes, with padding at the end. When a module runs, its hooks bring the whole together, and
those of modules after it ahead of time; small parameters stay whole. What is brought together is a copy,
which is freed where a part is changed; `settle` has to come before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "as_part",
    "end_engine",
    "exchange_part",
    "fp32_copy",
    "gathered",
    "is_split",
    "own_part",
    "put_fp32_copy",
    "put_part",
    "settle",
    "trains",
    "whole_of_parts",
    "whole_shape",
    "whole_state_dict",
]


def is_split(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter that stage 3 has split."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a parameter when it is whole; of any other tensor its own."""
    return getattr(tensor, "ds_shape", tensor.shape)


def settle(model: nn.Module) -> None:
    """Wait for parameters that are being brought together; none is then on its way.

    Args:
        model: The model that an engine was made for.
    """
    on_their_way = getattr(model, "ds_inflight_param_registry", None)
    if on_their_way:
        for handle in on_their_way.values():
            handle.wait()
        on_their_way.clear()


def _part(parameter: Any) -> Tensor:
    part: Tensor = parameter.ds_tensor
    if part.numel() != part.ds_numel:  # type: ignore[attr-defined]
        raise RuntimeError("a part of a parameter is not in memory: DeepSpeed has put it on a disk")
    return part


def _padding(parameter: Any) -> slice:
    """Return where this process's part is padding."""
    size = _part(parameter).numel()
    left = parameter.ds_numel - dist.get_rank(parameter.ds_process_group) * size
    return slice(min(max(left, 0), size), size)


def own_part(parameter: Tensor) -> Tensor:
    """Return a copy of this process's part, with zeros as its padding."""
    part = _part(parameter).detach().clone()
    part[_padding(parameter)] = 0
    return part


def _free(parameter: Any) -> None:
    if parameter.ds_status.name == "INFLIGHT":
        raise RuntimeError("a parameter is being brought together while its part is to be changed")
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def put_part(parameter: Tensor, part: Tensor) -> None:
    """Overwrite this process's part; the part of another device or dtype is converted."""
    _free(parameter)
    with torch.no_grad():
        _part(parameter).copy_(part)


def exchange_part(parameter: Tensor, part: Tensor) -> Tensor:
    """Let a parameter have another part in the place of its own, and return that; nothing is copied."""
    held: Any = _part(parameter)
    if part.shape != held.shape:
        raise RuntimeError(f"a part of shape {tuple(part.shape)} for one of {tuple(held.shape)}")
    _free(parameter)
    own = held.data
    held.data = part.to(device=own.device, dtype=own.dtype)
    return own


def as_part(whole: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a tensor that is whole on each of them, with zeros as its padding.

    Args:
        whole: Of the shape that the parameter has when it is whole.
        parameter: The parameter whose parts are followed.
    """
    size = _part(parameter).numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    part = whole.new_zeros(size)
    own = whole.reshape(-1)[start : start + size]
    part[: len(own)] = own
    return part


def whole_of_parts(part: Tensor, parameter: Any) -> Tensor:
    """Return the whole of which each process has a part, on the computing device (a collective)."""
    from deepspeed.accelerator import get_accelerator  # pyright: ignore[reportMissingImports]

    group = parameter.ds_process_group
    own = part.to(get_accelerator().current_device_name()).contiguous()
    whole = own.new_empty(own.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, own, group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def gathered(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which split parameters among these are whole, to be read (a collective)."""
    split = [tensor for tensor in tensors if tensor is not None and is_split(tensor)]
    if not split:
        return contextlib.nullcontext()
    from deepspeed import zero  # pyright: ignore

    return zero.GatheredParameters(split)


def fp32_copy(parameter: Tensor) -> Tensor | None:
    """Return what the optimizer trains for a parameter, for a split one its part (a collective).

    Returns:
        In fp32, a copy where it is a part; None where the optimizer trains nothing for it.
    """
    from deepspeed import utils  # pyright: ignore

    if not is_split(parameter):
        return utils.safe_get_full_fp32_param(parameter)
    held = utils.safe_get_local_fp32_param(parameter)
    if held is None:
        return None
    part = held.detach().clone()
    part[_padding(parameter)] = 0
    return part


def put_fp32_copy(parameter: Tensor, values: Tensor) -> None:
    """Overwrite what the optimizer trains for a parameter, by what `fp32_copy` returns."""
    from deepspeed import utils  # pyright: ignore

    put = utils.safe_set_local_fp32_param if is_split(parameter) else utils.safe_set_full_fp32_param
    put(parameter, values)


def trains(engine: Any) -> bool:
    """Tell whether a model is an engine with an optimizer; one without it only brings parameters together."""
    return hasattr(getattr(engine, "optimizer", None), "step")


def whole_state_dict(engine: Any, *, trained_only: bool) -> dict[str, Tensor] | None:
    """Return a stage-3 engine's whole tensors on the first process, None on the others (a collective)."""
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)


def end_engine(engine: Any) -> None:
    """Take an engine's hooks off its model, for which another may then be made.

    DeepSpeed itself leaves on it the hooks of the engine's forward, which keep engine and optimizer in
    memory, and with stage 3 the functions that bring parameters together for the backward pass, which the
    next engine would use in the place of its own.
    """
    model = engine.module
    engine.destroy()
    engine.optimizer = None  # else its own end, whenever that is, would take the next engine's marks away
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    settle(model)
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            module.__dict__.pop(name, None)
