"""The engine: memory, extension points that no shipped method uses yet, results of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ext.core import registry
from hf_ext.merging import MergeMethod, merge, register_merge, ties
from hf_ext.merging._base import Block, TensorInfo
from tests.conftest import REPOSITORY
from tests.merging.models import merged, random_models, save_model, tensors_of

# By how many bytes the resident set was larger at its peak than before each merge: the kernel's own record,
# which no sampling misses.
PEAK = """
import json, sys
from hf_ext.merging import merge

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

for number, config in enumerate(json.loads(sys.argv[1])):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    merge(config, f"{sys.argv[2]}/out{number}", progress=False)
    print(resident("VmHWM") - before)
"""
# What is freed goes back to the system at once, so that a peak is the program's and not the allocator's.
PROMPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
}


def growths(configs: Sequence[Mapping[str, Any]], folder: Path) -> list[int]:
    """Merge one after another in a process of its own; return by how many bytes each let it grow."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(configs), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **PROMPT, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(map(int, done.stdout.split()))


def test_memory_is_a_few_blocks_however_large_the_models(tmp_path: Path) -> None:
    folders = []
    for number in range(3):
        # 64 MiB in two tensors; both would show if a tensor or a shard were held.
        tensors = {name: torch.full((4096, 4096), float(number), dtype=torch.bfloat16) for name in "ab"}
        folders.append(str(save_model(tmp_path / f"m{number}", tensors)))
    common = {"threads": 2, "base_model": folders[0]}
    configs: list[dict[str, Any]] = [
        {"merge_method": "linear", "models": folders, **common},
        {"merge_method": "slerp", "models": folders[:2], "parameters": {"t": 0.5}, **common},
        {"merge_method": "ties", "models": folders[1:], "parameters": {"density": 0.5}, **common},
    ]
    linear, slerp, trimmed = growths(configs, tmp_path)
    # Two threads with buffers of 1 MiB for operands and the method, and what the interpreter takes.
    assert max(linear, slerp) < 40 << 20
    # All entries are equal here, so that TIES remembers as much as it may.
    assert trimmed < (40 << 20) + 2 * ties._REMEMBERED


def test_a_method_that_takes_models_in_turn_holds_one_of_them(tmp_path: Path) -> None:
    folders = []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        # 10 MiB in fp32: what is freed of this size goes back to the system at once.
        tensors = {"w": torch.randn(32, 81920, generator=generator).bfloat16()}
        folders.append(str(save_model(tmp_path / f"m{number}", tensors)))
    common = {"threads": 1, "base_model": folders[0], "merge_method": "opcm"}
    configs = [{"models": folders[1:count], **common} for count in (3, 6, 3)]
    _, five, two = growths(configs, tmp_path)  # the first one warms up
    # Measured: 10 MiB more. Three more models held would be 30 MiB.
    assert five < two + (15 << 20)


@pytest.fixture
def forget() -> Iterator[None]:
    """Take what a test registers out of the registry again."""
    before = set(registry.names("merge"))
    yield
    for name in set(registry.names("merge")) - before:
        registry.forget("merge", name)


@pytest.mark.usefixtures("forget")
def test_a_matrix_method_with_a_kept_tensor_and_a_global_norm(tmp_path: Path) -> None:
    @register_merge(
        "unit_sum", summary="the sum of task vectors, scaled to length one as a whole", paper=None
    )
    @dataclass(frozen=True, kw_only=True)
    class UnitSum(MergeMethod):
        """The base plus the normalized sum of task vectors."""

        granularity = "matrix"
        operands = "task_vectors"
        needs_base = True
        base_is_parent = False

        @property
        def scans(self) -> int:
            return 1

        @property
        def local(self) -> bool:
            return False

        def scan(self, number: int, block: Block) -> float:
            total = sum(block.operands[1:], block.operands[0].clone())
            assert total.shape == block.tensor.shape
            block.keep("sum", total)
            return float(total.double().square().sum())

        def settle(
            self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]
        ) -> float:
            return sum(total) ** 0.5

        def map(self, block: Block) -> Tensor:
            return block.kept("sum") / block.states[0]

        def extra_files(self, states: Sequence[Any]) -> dict[str, object]:
            return {"unit_sum.json": {"norm": states[0]}}

    base, *models = random_models(tmp_path, 3, dtype=torch.float32)
    found = merged(tmp_path, "unit_sum", models, base)
    start = tensors_of(base)
    length = sum(float((found[name] - start[name]).double().square().sum()) for name in found) ** 0.5
    assert abs(length - 1.0) < 1e-5
    norm = json.loads((tmp_path / "out" / "unit_sum.json").read_text())["norm"]
    sums = {
        name: torch.stack([tensors_of(model)[name] - start[name] for model in models]).sum(dim=0)
        for name in found
    }
    assert abs(norm - sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5) < 1e-4
    for name, value in found.items():
        torch.testing.assert_close(value, start[name] + sums[name] / norm, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob(".out*")), "what was kept has vanished"


@pytest.mark.usefixtures("forget")
def test_a_method_may_read_other_tensors_of_one_model(tmp_path: Path) -> None:
    @register_merge("swap_layers", summary="layer 0 from layer 1, the rest as it is", paper=None)
    @dataclass(frozen=True, kw_only=True)
    class SwapLayers(MergeMethod):
        """Layer 0 is made of layer 1."""

        def reads(self, name: str, parents: int) -> list[tuple[int, str]] | None:
            return [(0, name.replace("layers.0.", "layers.1."))] if "layers.0." in name else None

        def map(self, block: Block) -> Tensor:
            return block.operands[0]

    (model,) = random_models(tmp_path, 1)
    found, start = merged(tmp_path, "swap_layers", [model]), tensors_of(model)
    for name, value in found.items():
        assert torch.equal(value, start[name.replace("layers.0.", "layers.1.")])


@pytest.mark.usefixtures("forget")
def test_an_error_of_a_method_names_the_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    @register_merge("never", summary="refuses", paper=None)
    @dataclass(frozen=True, kw_only=True)
    class Never(MergeMethod):
        """Refuses every block."""

        def map(self, block: Block) -> Tensor:
            raise ValueError("masks differ")

    (model,) = random_models(tmp_path, 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight: masks differ"):
        merged(tmp_path, "never", [model])
    assert not list(tmp_path.glob("*out*"))


def test_the_number_of_torch_threads_is_as_before(tmp_path: Path) -> None:
    models = random_models(tmp_path, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        merge(
            {"merge_method": "linear", "models": [str(m) for m in models]}, tmp_path / "out", progress=False
        )
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
