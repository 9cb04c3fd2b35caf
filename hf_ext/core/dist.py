"""Process groups: each function is a no-op in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
GRACE = 0.1  # seconds in which the group's threads let go of what they hold


def is_distributed() -> bool:
    """Return whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Return this process's number; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def leave_group() -> None:
    """Take the process group down, so that this process may end whenever it likes.

    Gloo's threads give up the tensors of a collective after the call has returned, and need the interpreter's
    lock for it. One that asks when the interpreter has begun to end aborts the process, whose exit code then
    makes the launcher end the others (pytorch/pytorch issue 190489). The lock is free here for a moment; the
    threads cannot be joined, since a model under DDP keeps its group to the end.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(GRACE)


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite a tensor in place with the source process's values, and return it."""
    if is_distributed():
        _in_place(partial(dist.broadcast, src=source), tensor)
    return tensor


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor in place with its sum over processes, and return it."""
    if is_distributed():
        _in_place(dist.all_reduce, tensor)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor in place with its mean over processes, and return it."""
    if is_distributed():
        _in_place(dist.all_reduce, tensor)
        tensor /= dist.get_world_size()
    return tensor


def swapped(tensor: Tensor, partner: int) -> Tensor:
    """Return another process's tensor of the same shape and dtype; it calls this with this process's number.

    The processes that are not of the pair take no part.
    """
    held = tensor.contiguous()
    found = torch.empty_like(held)
    calls = [dist.P2POp(dist.isend, held, partner), dist.P2POp(dist.irecv, found, partner)]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return found


def on_main(action: Callable[[], None]) -> None:
    """Run an action on the first process, and raise on every process if it fails (a collective).

    Raises:
        OSError: The action failed; on the first process its own error is raised, whatever it is.
    """
    failed: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            failed = error
    texts: list[str | None] = [None if failed is None else str(failed)]
    if is_distributed():
        dist.broadcast_object_list(texts, src=0)
    if failed is not None:
        raise failed
    if texts[0] is not None:
        raise OSError(f"on the first process: {texts[0]}")


def _in_place(collective: Callable[[Tensor], Any], tensor: Tensor) -> None:
    # NCCL alone takes no tensors of the CPU, and takes contiguous ones only.
    backend = str(dist.get_backend())
    away = "nccl" in backend and "gloo" not in backend and tensor.device.type == "cpu"
    held = (tensor.cuda() if away else tensor).contiguous()
    collective(held)
    if held is not tensor:
        tensor.copy_(held)


def gather_objects(value: T) -> list[T]:
    """Return every process's value, in order of their numbers (a collective); small picklable values only."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Generator[None]:
    """Run the body on every process, and raise on all of them if it fails on one (a collective).

    Without it, a process whose part fails leaves the others waiting in their next collective.

    Raises:
        ValueError: The body failed elsewhere; a process where it failed raises its own error.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below
        failed = error
    texts = gather_objects(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    elsewhere = [f"process {number}: {text}" for number, text in enumerate(texts) if text is not None]
    if elsewhere:
        raise ValueError(elsewhere[0])


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a sharded one (a collective), any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def shard_like(whole: Tensor, sharded: Tensor) -> Tensor:
    """Return `whole` laid out as `sharded` is: this process's part of it for a DTensor, else itself.

    Args:
        whole: Values that are equal on every process.
        sharded: The tensor whose mesh and placements are taken.
    """
    if not hasattr(sharded, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = sharded.device_mesh, sharded.placements  # pyright: ignore[reportAttributeAccessIssue]
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, placements)


def awaits_broadcast() -> bool:
    """Return whether this process's weights are placeholders that FSDP will fill from rank 0.

    With FSDP's CPU-RAM-efficient loading only one process of a host reads the checkpoint; what is computed
    from the weights of the others would be computed from uninitialised memory.
    """
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in {"1", "true", "yes", "on"}
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true", "yes", "on"}
    return fsdp and efficient and is_distributed() and int(os.environ.get("LOCAL_RANK", "0")) != 0


def is_tensor_parallel(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over a mesh dimension that is not FSDP's."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and not set(mesh.mesh_dim_names or ()) <= {
        "fsdp",
        "dp",
        "dp_shard",
        "dp_replicate",
    }


def same_on_all_ranks(tensor: Tensor) -> bool:
    """Return whether a tensor has the same bits on every process (a collective)."""
    if not is_distributed():
        return True
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)
