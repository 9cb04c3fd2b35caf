"""In one process every function is a no-op; two processes are in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_ext.core import dist


def test_one_process_is_the_main_one_of_one() -> None:
    assert (dist.is_distributed(), dist.world_size(), dist.rank(), dist.is_main()) == (False, 1, 0, True)
    dist.barrier()


def test_collectives_return_the_very_tensor_unchanged() -> None:
    tensor = torch.tensor([1.0, 3.0])
    assert dist.broadcast_(tensor) is tensor
    assert dist.all_reduce_mean_(tensor) is tensor
    assert dist.all_reduce_sum_(tensor) is tensor
    assert dist.full_tensor(tensor) is tensor
    assert tensor.tolist() == [1.0, 3.0]
    assert dist.same_on_all_ranks(tensor)


def test_a_group_is_left_and_its_threads_get_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(dist.time, "sleep", waits.append)
    dist.leave_group()
    assert waits == []  # there is none
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    dist.leave_group()
    assert not torch.distributed.is_initialized()
    assert waits == [dist.GRACE]


def test_objects_are_gathered_from_the_one_process() -> None:
    assert dist.gather_objects({"a": 1}) == [{"a": 1}]


def test_together_passes_an_error_on() -> None:
    with dist.together():
        pass
    with pytest.raises(KeyError, match="lost"), dist.together():
        raise KeyError("lost")


def test_together_raises_where_another_process_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "gather_objects", lambda text: [text, "no rows"])
    with pytest.raises(ValueError, match="process 1: no rows"), dist.together():
        pass


def test_a_parameter_is_not_taken_for_a_sharded_one() -> None:
    whole, parameter = torch.ones(2), nn.Parameter(torch.zeros(2))
    assert dist.shard_like(whole, parameter) is whole
    assert not dist.is_tensor_parallel(parameter)


def test_weights_are_awaited_only_on_other_ranks_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not dist.awaits_broadcast()  # one process has nobody to wait for


@pytest.mark.parametrize(
    ("fsdp", "efficient", "local_rank", "awaits"),
    [
        ("true", "true", "1", True),
        ("True", "1", "3", True),
        ("true", "true", "0", False),
        ("false", "true", "1", False),
        ("true", "false", "1", False),
        ("", "", "1", False),
    ],
)
def test_who_awaits_in_a_group(
    monkeypatch: pytest.MonkeyPatch, fsdp: str, efficient: str, local_rank: str, awaits: bool
) -> None:
    monkeypatch.setattr(dist, "is_distributed", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert dist.awaits_broadcast() is awaits
