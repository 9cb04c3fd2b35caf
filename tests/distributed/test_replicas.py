"""Lost stages, and replicas that train alone, on two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_ext.callbacks import gossip_pairs
from tests.callbacks.runs import ROWS, equal, parameters
from tests.callbacks.test_stage_recovery import trained
from tests.distributed.launch import two_processes
from tests.distributed.replicas_worker import LOST

pytestmark = pytest.mark.distributed
Ends = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all runs once."""
    out = tmp_path_factory.mktemp("replicas")
    two_processes("tests.distributed.replicas_worker", out, timeout=200)
    return out


@pytest.fixture(scope="module")
def ends(folder: Path) -> Ends:
    """Return what each process has in the end, by run."""
    names = {path.name.partition(".")[0] for path in folder.glob("*.safetensors")}
    return {name: _of_ranks(folder, name) for name in names}


def _of_ranks(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (load_file(folder / f"{name}.rank{rank}.safetensors") for rank in (0, 1))
    return first, second


def test_a_stage_is_rebuilt_alike_and_as_on_one_process(ends: Ends, tmp_path: Path) -> None:
    first, second = ends["stages"]
    assert equal(first, second)
    for resumed in ends["stages-resumed"]:
        assert equal(resumed, first)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    alone = trained(tmp_path, **LOST, settings={"swap_prob": 0.5}, **options)
    for name, expected in parameters(alone).items():
        torch.testing.assert_close(first[name], expected, rtol=0.0, atol=1e-6)


def test_replicas_go_their_own_way_and_their_merge_is_the_optimum_of_both(ends: Ends) -> None:
    own = 1.0 - 0.9**50  # 0.994846
    first, second = (float(end["x"]) for end in ends["alone"])
    assert (first, second) == (pytest.approx(own, abs=1e-6), pytest.approx(-own, abs=1e-6))
    assert [float(end["x"]) for end in ends["merged"]] == [0.0, 0.0]
    # A dense round, or that of the only pair, after the last step is the merge.
    assert [float(end["x"]) for end in ends["dense"]] == [0.0, 0.0]
    assert [float(end["x"]) for end in ends["pairs"]] == [0.0, 0.0]


@pytest.mark.parametrize("step", [6, 7])  # between two rounds, and within one
@pytest.mark.parametrize("merge", [False, True])
def test_each_replica_resumes_its_own_run(merge: bool, step: int, ends: Ends, folder: Path) -> None:
    whole, resumed = ends[f"gossip-{merge}"], ends[f"gossip-{merge}-{step}"]
    for rank in (0, 1):
        assert equal(resumed[rank], whole[rank])
    assert equal(*whole) is merge
    name = "hf_ext_local_train"
    saved = folder / f"gossip-{merge}" / f"checkpoint-{step}"
    states = [load_file(saved / f"{name}.rank{rank}.safetensors") for rank in (0, 1)]
    assert states[0].keys() == states[1].keys()
    assert "statistics:norm.running_var" in states[0]
    talked = [bool(gossip_pairs(2, number, 0.6, seed=5)) for number in range(5)]
    assert talked == [True, True, False, True, False]
    for key in ("local:line.weight", "statistics:norm.running_mean"):
        assert not torch.equal(states[0][key], states[1][key])


def test_the_policies_of_batch_norms(ends: Ends) -> None:
    merged, pooled, average = (ends[name][0] for name in ("gossip-True", "pool", "average"))
    for name in ("pool", "average", "gossip-True"):
        assert equal(*ends[name])
    for weight in ("line.weight", "line.bias", "norm.weight"):
        assert torch.equal(pooled[weight], average[weight])
        assert torch.equal(pooled[weight], merged[weight])
    assert torch.equal(pooled["norm.running_mean"], average["norm.running_mean"])
    a, b = ends["gossip-False"]  # what the others had before their merge: the last round is silent
    mean = (a["norm.running_mean"] + b["norm.running_mean"]) / 2
    torch.testing.assert_close(average["norm.running_mean"], mean)
    variance = (a["norm.running_var"] + b["norm.running_var"]) / 2
    torch.testing.assert_close(average["norm.running_var"], variance)
    spread = ((a["norm.running_mean"] - b["norm.running_mean"]) / 2).square()
    torch.testing.assert_close(pooled["norm.running_var"], variance + spread, rtol=1e-4, atol=1e-3)
    # Taken anew over all rows: the set's own mean and unbiased variance, as the norm is the first layer.
    rows = torch.tensor(ROWS).double()
    torch.testing.assert_close(merged["norm.running_mean"].double(), rows.mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(merged["norm.running_var"].double(), rows.var(0), rtol=1e-6, atol=0.0)
    assert (pooled["norm.running_var"] > average["norm.running_var"]).all()
