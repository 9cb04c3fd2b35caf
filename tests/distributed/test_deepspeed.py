"""Trainers under DeepSpeed's ZeRO on two gloo processes: they train what they train without it.

DeepSpeed lies beside the environment (see the Makefile), as accelerate and transformers import it in every
process that can find it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import deepspeed_worker as worker
from tests.distributed.launch import result, two_processes
from tests.registry_cases import methods
from tests.trainers.runs import MODELS, model_folder, models_root

pytestmark = pytest.mark.distributed
ASIDE = Path(sys.prefix) / "aside"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the worker's runs, all of them in one start."""
    assert (ASIDE / "deepspeed").is_dir(), f"{ASIDE} lacks deepspeed: run `make install`"
    for seed in range(3):
        model_folder(seed)  # in a process group transformers writes on one rank alone
    model_folder(**worker.ODD)
    out = tmp_path_factory.mktemp("deepspeed")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ASIDE)]))
    environment = {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", MODELS: str(models_root())}
    two_processes("tests.distributed.deepspeed_worker", out, timeout=420, **environment)
    return out


def test_every_trainer_has_a_case() -> None:
    tried = {case.trainer for case in worker.CASES.values()}
    assert tried == {str(case.id) for case in methods("trainer", variants=False)}


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with each LoRA's two factors as their product: their rank hangs on the last rounding."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        first, factor, rest = name.partition(".lora_A.")
        if factor:
            value = tensors[f"{first}.lora_B.{rest}"] @ value
        if ".lora_B." not in name:
            found[name] = value
    assert len(found) < len(tensors)
    return found


@pytest.mark.parametrize("case", worker.CASES)
def test_training_is_that_without_deepspeed(case: str, outputs: Path) -> None:
    expected = result(outputs, worker.CASES[case].trainer, "plain")
    found = result(outputs, case, "whole")
    assert expected.keys() == found.keys()
    if worker.CASES[case].trainer == "apo":
        expected, found = map(updates, (expected, found))
    for key, value in expected.items():
        # Gradients are clipped by one division less.
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("case", worker.CASES)
def test_ranks_agree_and_a_resumed_run_is_bit_equal(case: str, outputs: Path) -> None:
    whole = result(outputs, case, "whole")
    for run, rank in (("whole", 1), *((way, 0) for way in worker.CASES[case].ways)):
        other = result(outputs, case, run, rank)
        assert other.keys() == whole.keys()
        assert all(torch.equal(value, other[key]) for key, value in whole.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_policies_in_half_precision_are_whole_between_rounds(stage: int, outputs: Path) -> None:
    start, left = (result(outputs, "half", run) for run in ("plain", f"stage{stage}"))
    assert not torch.equal(start["lm_head.weight"], start["lm_head.weight"].bfloat16().float())
    assert start.keys() == left.keys()
    assert all(torch.equal(value, left[name]) for name, value in start.items())


@pytest.mark.parametrize("case", [name for name, case in worker.CASES.items() if case.trainer == "apo"])
def test_a_saved_adapter_is_that_of_the_run(case: str, outputs: Path) -> None:
    trained = result(outputs, case, "whole")
    saved = load_file(outputs / case / "saved" / "adapter_model.safetensors")
    assert saved
    assert all(torch.equal(v, trained[k.replace(".weight", ".default.weight")]) for k, v in saved.items())


def test_a_teacher_given_before_the_model_is_split_is_that_without_deepspeed(outputs: Path) -> None:
    expected, found = (result(outputs, "taught", run) for run in ("plain", "stage3"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_is_the_extrapolated_policy(half: bool, outputs: Path) -> None:
    folder = outputs / f"saved-half{half}"
    saved = load_file(folder / "saved" / "model.safetensors")
    hat, policy = (load_file(folder / "round_0" / f"{name}.safetensors") for name in ("hat", "policy"))
    assert saved.keys() == policy.keys()
    for name, value in saved.items():
        assert value.dtype == (torch.bfloat16 if half else torch.float32)
        assert torch.equal(value, policy[name].to(value.dtype))
    assert not torch.equal(saved["lm_head.weight"], hat["lm_head.weight"].to(saved["lm_head.weight"].dtype))


@pytest.mark.parametrize("name", worker.REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str, outputs: Path) -> None:
    errors = json.loads((outputs / "refused.json").read_text(encoding="utf-8"))
    assert worker.REFUSED[name][1] in errors.get(name, "accepted")
