"""Updates that a scaler of gradients skips in fp16: what the callbacks of schedules count of them.

That rates wait for them, and that resumed runs are those that were not interrupted, is in
tests/contracts/test_callbacks.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import TrainerCallback

from hf_ext.callbacks import (
    AdaptiveBatchSizeCallback,
    AnnealingLawCallback,
    ContinualEMACallback,
    HypergradientCallback,
    InfiniteLRCallback,
    RefinedLinearDecayCallback,
)
from hf_ext.callbacks._base import Callback
from hf_ext.core.state import load_scalars
from tests.callbacks.runs import STEPS, build, build_fp16, logged

OVERFLOWS = (1, 4, 5)
MADE = [update for update in range(1, STEPS + 1) if update not in OVERFLOWS]


class After(TrainerCallback):
    """Keep what a callback's attribute is after each update; must come after the callback."""

    def __init__(self, callback: Callback, *names: str) -> None:
        self.callback, self.names = callback, names
        self.seen: list[list[Any]] = []
        self.rates: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        values = [getattr(self.callback, name) for name in self.names]
        self.seen.append([_copied(value) for value in values])


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: tensor.tolist() for name, tensor in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def run(folder: Path, callback: Callback, *names: str, **options: Any) -> tuple[Any, list[list[Any]]]:
    """Train with overflows, and return the trainer and what attributes were after each update."""
    after = After(callback, *names)
    options = {"overflows": OVERFLOWS, "save_strategy": "no", **options}
    trainer = build_fp16(folder, callback, **options)
    trainer.add_callback(after)
    trainer.train()
    assert len(after.seen) == trainer.state.global_step
    assert after.rates == logged(trainer, "learning_rate")
    return trainer, after.seen


def moved(seen: list[list[Any]]) -> list[int]:
    """Return after which updates, by their numbers from 1, something was not as before."""
    return [update for update in range(2, len(seen) + 1) if seen[update - 1] != seen[update - 2]]


def test_the_law_s_trace_has_the_updates_that_were_made(tmp_path: Path) -> None:
    callback = AnnealingLawCallback()
    with pytest.warns(UserWarning, match="without a fit"):
        trainer, _ = run(tmp_path, callback, eval_strategy="steps", eval_steps=5)
    rates = logged(trainer, "learning_rate")
    trace = callback.trace()
    assert trace.rates.tolist() == [rates[update - 1] for update in MADE]
    assert trace.steps.tolist() == [2, 7]  # updates before the evaluations after 5 and 10


def test_norms_of_skipped_updates_are_not_recorded(tmp_path: Path) -> None:
    callback = RefinedLinearDecayCallback()
    trainer, _ = run(tmp_path, callback)
    norms = callback.recorded()
    assert norms.step.tolist() == list(range(1, len(MADE) + 1))
    seen = logged(trainer, "grad_norm")
    assert norms.l2.tolist() == pytest.approx([seen[update - 1] for update in MADE])


@pytest.mark.parametrize("unseen", [False, True])
def test_an_average_waits(unseen: bool, tmp_path: Path) -> None:
    callback = ContinualEMACallback(fallback=0.2, use_for_eval=False)
    _, seen = run(tmp_path, callback, "_average", "_gradient", "_updates", unseen=unseen)
    assert moved(seen) == [update for update in MADE if update > 1]
    assert seen[-1][2] == len(MADE)


def test_a_local_rate_is_corrected_by_updates_that_were_made(tmp_path: Path) -> None:
    callback = HypergradientCallback(variant="none", local="CL", local_steps=5)
    trainer, seen = run(tmp_path, callback, "beta", "_last_step")
    betas = [beta for beta, _ in seen]
    # A round's first update is compared with none; 2, 4 and 5 of the first round are thus without a change.
    assert moved([[beta] for beta in betas]) == [3, 6, 7, 8, 9, 10]
    assert betas[:2] == [1.0, 1.0]
    assert betas[5] == 1.0  # the next round has begun: rounds are of updates that were tried
    assert callback.rounds == 2
    assert seen[3] == seen[4] == seen[2]
    given_back = [group["lr"] for group in trainer.optimizer.param_groups]
    assert given_back == trainer.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("overflows", [(8,), (7, 8), (10,), (9, 10)])
def test_an_anneal_waits(overflows: tuple[int, ...], tmp_path: Path) -> None:
    """It begins with the eighth update that is made, from a checkpoint that is kept once."""
    settings: dict[str, Any] = {"warmup_steps": 1, "cooldown_steps": 2, "anneal_start": 7, "anneal_steps": 2}
    saved = Saved()
    callback = InfiniteLRCallback(**settings)
    trainer = build_fp16(tmp_path, callback, overflows=overflows, others=[saved], save_strategy="no")
    trainer.train()
    plain = build(tmp_path / "plain", InfiniteLRCallback(**settings), save_strategy="no")
    plain.train()
    rates = logged(trainer, "learning_rate")
    made = [rate for update, rate in enumerate(rates, 1) if update not in overflows]
    assert made == logged(plain, "learning_rate")[: len(made)]
    start = [update for update in range(1, STEPS + 1) if update not in overflows][6]
    assert saved.steps == [start, trainer.state.global_step]
    branch = load_scalars(tmp_path / "infinite_branch", callback.file_name())
    assert branch["step"] == start
    assert trainer.state.global_step == STEPS


class Saved(TrainerCallback):
    """Keep after which updates checkpoints were written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


@pytest.mark.parametrize("unseen", [False, True])
def test_a_batch_does_not_grow_by_an_overflow(unseen: bool, tmp_path: Path) -> None:
    """Its samples are used up all the same, as in a run of the Trainer alone."""
    callback = AdaptiveBatchSizeCallback(batch_max=16, eta=1e-3, growth_cap=1.5)
    trainer, seen = run(
        tmp_path, callback, "factor", "_required", gradient_accumulation_steps=2, unseen=unseen
    )
    assert [factor for factor, _ in seen] == [1, 2, 3, 3, 3]  # 4 without the overflows of updates 4 and 5
    assert seen[0][1] == 0.0
    assert seen[2] == seen[3] == seen[4]
    batches = logged(trainer, "adaptive_batch_size/batch")
    assert batches == [4, 4, 8, 12, 12]
    assert logged(trainer, "adaptive_batch_size/samples")[-1] == sum(batches) == STEPS * 4
    assert all(math.isfinite(entry) for entry in logged(trainer, "adaptive_batch_size/required"))
    rates = [round(1000 * rate) for rate in logged(trainer, "learning_rate")]
    # By samples; the Trainer cannot tell an update that its optimizer has left out by itself.
    assert rates == ([10, 9, 8, 6, 3] if unseen else [10, 10, 9, 7, 7])
