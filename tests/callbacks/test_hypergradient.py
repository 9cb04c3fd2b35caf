"""Properties of FedHyper; what every callback must do is in tests/contracts/test_callbacks.py."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_ext.callbacks import ContinualEMACallback, HypergradientCallback, agreement
from hf_ext.callbacks._local_updates import _mean_of_finite_
from tests.callbacks.runs import BEST, MIDDLE, Bumpy, build, equal, logged, parameters, rows, tiny_model
from tests.conftest import REPOSITORY
from tests.reference import hypergradient as reference


def vector(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values)}


def rounds(callback: HypergradientCallback, start: dict[str, Tensor], *deltas: Any) -> list[list[float]]:
    """Return the weights after rounds in which the processes' mean moves by these displacements."""
    anchor, seen = start, []
    for delta in deltas:
        mean = {name: value + delta[name] for name, value in anchor.items()}
        anchor = callback.next_anchor(mean, anchor, True)
        seen.append(anchor["w"].tolist())
    return seen


FIRST, SECOND = vector(0.1, 0.2), vector(0.2, 0.1)


@pytest.mark.parametrize(
    ("settings", "alpha", "end"),
    [
        ({"agreement": "raw"}, 1.04, [0.1 + 0.208, 0.2 + 0.104]),
        ({}, 1.08, [0.1 + 0.216, 0.2 + 0.108]),
        ({"variant": "GM", "agreement": "raw"}, 1.04, [0.1 + 0.2116, 0.2 + 0.1112]),
        ({"variant": "none"}, 1.0, [0.3, 0.3]),
        ({"variant": "SL"}, 1.0, [0.3, 0.3]),
    ],
)
def test_hand_computed_rounds(settings: dict[str, Any], alpha: float, end: list[float]) -> None:
    callback = HypergradientCallback(**settings)
    after = rounds(callback, vector(0.0, 0.0), FIRST, SECOND)
    assert after[0] == pytest.approx([0.1, 0.2])
    assert callback.alpha == pytest.approx(alpha)
    assert after[1] == pytest.approx(end)
    if settings.get("variant") == "GM":
        assert callback.shared_state()["before"]["w"].tolist() == pytest.approx([0.29, 0.28])
    if settings.get("variant") == "SL":
        assert callback.local_factor == pytest.approx(1.08)


def test_the_outer_factor_stays_in_its_bounds() -> None:
    callback = HypergradientCallback(agreement="raw")
    alphas = []
    # Products 3 and -10 of each displacement with the one before it.
    for delta in (vector(1.0, 0.0), vector(3.0, 1.0), vector(-10.0, 20.0)):
        rounds(callback, vector(0.0, 0.0), delta)
        alphas.append(callback.alpha)
    assert alphas == pytest.approx([1.0, 3.0, 1.0 / 3.0])


def corrected(settings: dict[str, Any], last: list[float], before: list[float], processes: int) -> float:
    """Return the local factor after steps (-0.1, 0) and `last`, on one of several processes."""
    callback = HypergradientCallback(local="CL", **settings)
    callback._before = vector(*before)
    found = pytest.MonkeyPatch()
    with found.context() as patch:
        patch.setattr("hf_ext.callbacks.hypergradient.dist.world_size", lambda: processes)
        for step in ([-0.1, 0.0], last):
            callback._correct(vector(*step))
    return callback.beta


def test_hand_computed_local_steps() -> None:
    # Agreements 0.707107 and 0.948683: 1 + 0.1 (0.707107 + 0.948683 / 2) = 1.118145, held to 1.1.
    assert corrected({}, [-0.05, -0.05], [-0.2, -0.4], 2) == pytest.approx(1.1)
    # The opposite step: 0.881855, held to 1 / 1.1.
    assert corrected({}, [0.05, 0.05], [-0.2, -0.4], 2) == pytest.approx(1.0 / 1.1)
    assert corrected({"kappa_local": 0.01}, [-0.05, -0.05], [-0.2, -0.4], 2) == pytest.approx(1.0118145)
    additive = {"cl_update": "additive", "kappa_local": 1.0}
    assert corrected(additive, [-0.05, -0.05], [-0.2, -0.4], 2) == pytest.approx(2.18145, rel=1e-5)


def test_agreement_and_scale() -> None:
    x, y = {"a": torch.randn(3, 4), "b": torch.randn(5)}, {"a": torch.randn(3, 4), "b": torch.randn(5)}
    scaled = [{name: 7.0 * value for name, value in part.items()} for part in (x, y)]
    assert agreement(*scaled) == pytest.approx(agreement(x, y), rel=1e-5)
    assert agreement(*scaled, "raw") == pytest.approx(49.0 * agreement(x, y, "raw"), rel=1e-5)
    assert agreement(x, x) == pytest.approx(1.0)
    nothing = {name: torch.zeros_like(value) for name, value in x.items()}
    assert agreement(x, nothing) == agreement(nothing, nothing, "raw") == 0.0
    for broken in (torch.nan, torch.inf):
        unbounded = {"a": x["a"] * broken, "b": x["b"]}
        assert agreement(x, unbounded) == agreement(unbounded, y, "raw") == 0.0


class Quadratic(nn.Module):
    """Loss sum(scale * w^2) / 2; rows carry nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.register_buffer("scale", torch.tensor([1.0, 3.0, 10.0]))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        return {"loss": (self.scale * self.w.square()).sum() / 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "G"},
        {"variant": "GM"},
        {"variant": "SL"},
        {"variant": "none", "local": "CL"},
        {"variant": "G", "local": "CL", "cl_update": "additive"},
        {"variant": "G", "agreement": "raw", "kappa_global": 0.1, "kappa_local": 0.1},
    ],
    ids=str,
)
def test_a_run_is_that_of_the_plain_loops(settings: dict[str, Any], tmp_path: Path) -> None:
    model = Quadratic()
    trainer = build(
        tmp_path,
        HypergradientCallback(local_steps=3, **settings),
        model=model,
        max_steps=15,
        optim="sgd",
        learning_rate=0.03,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
    )
    trainer.train()
    expected = reference.train(
        [1.0, -2.0, 0.5],
        lambda _, __, w: [a * b for a, b in zip((1.0, 3.0, 10.0), w, strict=True)],
        processes=1,
        rounds=5,
        local_steps=3,
        rate=0.03,
        variant=settings["variant"],
        local=settings.get("local", "none"),
        kind=settings.get("agreement", "cosine"),
        additive=settings.get("cl_update") == "additive",
    )
    assert model.w.tolist() == pytest.approx(expected[-1], rel=1e-5)


def test_on_a_parabola_the_factor_rises_by_kappa_each_round(tmp_path: Path) -> None:
    # Displacements are parallel as long as no weight changes its sign.
    trainer = build(
        tmp_path,
        HypergradientCallback(local_steps=1, kappa_global=0.5),
        model=Quadratic(),
        optim="sgd",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
    )
    trainer.train()
    alphas = logged(trainer, "hypergradient/alpha")
    assert alphas[:5] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0], abs=1e-3)
    assert alphas[5:] == pytest.approx([3.0] * 5)


def test_without_a_step_of_the_rules_rounds_change_no_bit(tmp_path: Path) -> None:
    ends = []
    still = HypergradientCallback(local_steps=2, kappa_global=0.0, kappa_local=0.0, local="CL")
    for callbacks in ([], [still]):
        trainer = build(tmp_path, *callbacks, save_strategy="no")
        trainer.train()
        ends.append(parameters(trainer))
    assert equal(*ends)


def test_the_log_has_the_schedules_rate_and_the_factor_beside_it(tmp_path: Path) -> None:
    plain = build(tmp_path, save_strategy="no")
    plain.train()
    callback = HypergradientCallback(variant="SL", local_steps=1, kappa_global=0.5)
    trainer = build(tmp_path, callback, save_strategy="no")
    trainer.train()
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    assert max(logged(trainer, "hypergradient/beta_mean")) > 1.4
    assert trainer.optimizer is not None
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.0]


class Broken(Quadratic):
    """Its loss is no number from the fifth batch on."""

    def __init__(self, batches: range) -> None:
        super().__init__()
        self.batches, self.seen = batches, 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        self.seen += 1
        loss = super().forward(input_ids)["loss"]
        return {"loss": loss * (torch.nan if self.seen in self.batches else 1.0)}


def test_a_round_that_is_not_finite_is_left_out_and_three_end_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    callback = HypergradientCallback(local_steps=2)
    model = Broken(range(5, 7))  # the third round
    build(tmp_path, callback, model=model, **options).train()
    assert torch.isfinite(model.w).all()
    assert callback.failures == 1
    worse = build(tmp_path, HypergradientCallback(local_steps=2), model=Broken(range(1, 9)), **options)
    with pytest.raises(
        ValueError, match=r"not finite at the end of a round, for the 3\. time.*learning_rate"
    ):
        worse.train()


@pytest.mark.parametrize("settings", [{}, {"variant": "GM", "local": "CL"}, {"local": "CL"}])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_one_batch_that_is_no_number_costs_one_round(
    settings: dict[str, Any], optim: str, tmp_path: Path
) -> None:
    callback = HypergradientCallback(local_steps=2, **settings)
    model = Broken(range(5, 6))
    options: dict[str, Any] = {"optim": optim, "max_grad_norm": 0.0, "save_strategy": "no"}
    trainer = build(tmp_path, callback, model=model, **options)
    trainer.train()
    assert torch.isfinite(model.w).all()
    assert callback.failures == 1
    assert math.isfinite(callback.beta)
    assert all(map(math.isfinite, logged(trainer, "hypergradient/agreement")))


def test_a_failed_round_forgets_what_was_learned_in_it() -> None:
    callback = HypergradientCallback(local="CL")
    callback._optimizer = SimpleNamespace(state={"w": 1})
    callback.beta, callback._last_step = 1.5, vector(torch.nan)
    callback._fail(vector(0.0))
    assert callback.beta == 1.0
    assert callback._last_step is None
    assert callback._optimizer.state == {}


def test_statistics_are_a_mean_of_those_that_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [torch.tensor(1.0), torch.tensor([4.0, 6.0])]  # of another process: how many, and the sum

    def summed(tensor: Tensor) -> Tensor:
        return tensor + others[0 if tensor.dim() == 0 else 1]

    monkeypatch.setattr("hf_ext.callbacks._local_updates.dist.all_reduce_sum_", summed)
    own, broken = torch.tensor([2.0, 0.0]), torch.tensor([torch.nan, 0.0])
    for buffer in (own, broken):
        _mean_of_finite_(buffer)
    assert own.tolist() == [3.0, 3.0]
    assert broken.tolist() == [4.0, 6.0]
    others[:] = [torch.tensor(0.0), torch.zeros(2)]
    _mean_of_finite_(broken := torch.tensor([torch.inf, 1.0]))
    assert broken.tolist() == [torch.inf, 1.0]


def test_local_rates_look_at_the_displacement_and_not_at_the_momentum() -> None:
    callback = HypergradientCallback(variant="GM", local="CL")
    rounds(callback, vector(0.0, 0.0), vector(1.0, 0.0), vector(0.0, 1.0))
    assert callback.shared_state()["before"]["w"].tolist() == pytest.approx([0.9, 1.0])
    for _ in range(2):
        callback._correct(vector(0.0, 1.0))
    assert callback.beta == pytest.approx(1.1)  # 1 + 0.1 (1 + 1), held; 1.174 of the momentum is held too
    callback.beta = 1.0
    callback.kappa_local = 0.01
    callback._correct(vector(0.0, 1.0))
    assert callback.beta == pytest.approx(1.02)
    assert sorted(callback.shared_state()) == ["before", "displacement"]


class Patience(TrainerCallback):
    """Stops a run from an evaluation."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_an_evaluation_stops_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    others = [Patience(7)]
    options: dict[str, Any] = {"load_best_model_at_end": True, **BEST}
    callback = HypergradientCallback(local_steps=2)
    trainer = build(tmp_path, callback, others=others, **options)
    Bumpy(trainer)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name == f"checkpoint-{MIDDLE}"
    assert callback.alpha != 1.0  # by which a round's end moves weights
    stored = dict(type(tiny_model()).from_pretrained(best).named_parameters())
    assert equal(parameters(trainer), stored)


def test_the_best_checkpoint_of_a_run_that_the_evaluation_of_an_epoch_stops(tmp_path: Path) -> None:
    callback = HypergradientCallback(local_steps=3)
    data = rows().select(range(8))  # four updates
    options: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "data": data}
    options |= {"load_best_model_at_end": True}
    trainer = build(tmp_path, callback, others=[Patience(8)], **options)
    Bumpy(trainer)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name == "checkpoint-4"
    assert callback.alpha != 1.0
    stored = dict(type(tiny_model()).from_pretrained(best).named_parameters())
    assert equal(parameters(trainer), stored)


def test_a_run_that_the_evaluation_of_an_epoch_stops_ends_its_round(tmp_path: Path) -> None:
    # That evaluation comes after the epoch's end, and the run's own end is the next event.
    callback = HypergradientCallback(local_steps=5)
    data = rows().select(range(8))  # four updates
    options: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "no", "data": data}
    ends = []
    for others in ([], [Patience(8)]):
        trainer = build(tmp_path, callback, others=others, lr_scheduler_type="constant", **options)
        trainer.train()
        ends.append((trainer.state.global_step, callback.in_round, callback.rounds))
    assert ends == [(10, 0, 2), (8, 0, 2)]


@pytest.mark.parametrize("first", [True, False])
def test_a_last_round_leaves_the_average_that_was_evaluated(first: bool, tmp_path: Path) -> None:
    pair = [ContinualEMACallback(coefficient=0.3), HypergradientCallback(local_steps=2)]
    options: dict[str, Any] = {**BEST, "save_strategy": "no"}
    trainer = build(tmp_path, *(pair if first else pair[::-1]), others=[Patience(7)], **options)
    bumpy = Bumpy(trainer)
    trainer.train()
    assert trainer.state.global_step == 7
    assert equal(parameters(trainer), bumpy.seen[-1])


def test_nothing_is_held_after_a_run(tmp_path: Path) -> None:
    callback = HypergradientCallback(variant="GM", local="CL", local_steps=2)
    trainer = build(tmp_path, callback, save_strategy="no")
    held = weakref.ref(trainer.model.model.norm.weight)
    trainer.train()
    del trainer
    gc.collect()
    assert held() is None
    assert not any(
        isinstance(t, Tensor) for v in vars(callback).values() if isinstance(v, dict) for t in v.values()
    )


@pytest.mark.parametrize("settings", [{"variant": "SL"}, {"local": "CL"}])
def test_local_rates_need_an_optimizer_that_steps_by_itself(settings: dict[str, Any], tmp_path: Path) -> None:
    class LayerWiseSGD(torch.optim.SGD): ...

    model = tiny_model()
    trainer = build(tmp_path, HypergradientCallback(**settings), model=model)
    trainer.optimizer = LayerWiseSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optim must be one that steps after the backward pass"):
        trainer.train()


def test_local_rates_need_weights_that_can_hold_their_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"local must be 'none'.*fp32.*model\."):
        build(tmp_path, HypergradientCallback(local="CL"), model=tiny_model().bfloat16()).train()


def test_weights_of_few_bits_keep_an_anchor_of_fp32(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"local_steps": 5, "kappa_global": 0.5}
    whole = build(tmp_path / "whole", HypergradientCallback(**settings), model=tiny_model().bfloat16())
    whole.train()
    state = load_file(tmp_path / f"whole/checkpoint-{MIDDLE}/hf_ext_hypergradient.rank0.safetensors")
    assert {t.dtype for name, t in state.items() if name.startswith("anchor:")} == {torch.float32}
    again = build(tmp_path / "again", HypergradientCallback(**settings), model=tiny_model().bfloat16())
    again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{MIDDLE}"))
    assert equal(parameters(again), parameters(whole))


# Two processes ------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
import torch.distributed as dist
from tests.callbacks.runs import build, parameters
from tests.distributed.launch import leave
from hf_ext.callbacks import HypergradientCallback
out, name = Path(sys.argv[1]), sys.argv[2]
settings = eval(name)
trainer = build(out, HypergradientCallback(**settings), optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
                average_tokens_across_devices=True, save_steps=3)
trainer.train()
assert trainer.model_wrapped.require_forward_param_sync is True
assert trainer.args.average_tokens_across_devices is True
save_file(parameters(trainer), out / f"end.rank{dist.get_rank()}.safetensors")
again = build(out / "again", HypergradientCallback(**settings), optim="sgd", learning_rate=0.1,
              max_grad_norm=0.0, save_strategy="no")
again.train(resume_from_checkpoint=str(out / "checkpoint-6"))
save_file(parameters(again), out / f"again.rank{dist.get_rank()}.safetensors")
leave()
"""


def on_two_processes(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    script = out / "worker.py"
    out.mkdir(parents=True, exist_ok=True)
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(out), repr(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: load_file(path) for path in out.glob("*.safetensors")}


@pytest.mark.distributed
def test_rounds_of_one_step_of_sgd_are_data_parallel_training(tmp_path: Path) -> None:
    ends = on_two_processes(tmp_path / "two", {"variant": "none", "local_steps": 1})
    alone = build(
        tmp_path / "one",
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        data=rows(),
        save_strategy="no",
    )
    alone.train()
    for name, expected in parameters(alone).items():
        torch.testing.assert_close(ends["end.rank0"][name], expected, rtol=0.0, atol=1e-6)


@pytest.mark.distributed
def test_processes_part_within_a_round_and_a_checkpoint_in_it_resumes(tmp_path: Path) -> None:
    settings = {"variant": "G", "local": "CL", "local_steps": 4, "kappa_global": 0.5}
    ends = on_two_processes(tmp_path, settings)
    assert equal(ends["end.rank0"], ends["end.rank1"])
    assert equal(ends["again.rank0"], ends["end.rank0"])
    assert equal(ends["again.rank1"], ends["end.rank0"])
    # Step 6 is in the second round: each process has weights of its own.
    files = [load_file(tmp_path / f"checkpoint-6/hf_ext_hypergradient.rank{r}.safetensors") for r in (0, 1)]
    local = [{k: v for k, v in f.items() if k.startswith("local:")} for f in files]
    assert local[0].keys() == local[1].keys()
    assert not equal(*local)
    # What is the same for all is written once.
    assert any(key.startswith("anchor:") for key in files[0])
    assert not any(key.startswith(("anchor:", "shared.")) for key in files[1])
