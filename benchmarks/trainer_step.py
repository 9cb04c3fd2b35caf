"""Time of a training step and peak memory of each trainer, as ratios to TRL's trainer that it extends.

Run: OMP_NUM_THREADS=1 python benchmarks/trainer_step.py [--rounds 8] [--steps 6] [--only NAME,...]
     [--out docs/assets/trainer_step.json]

The embedded model, fp32, one thread, settings under which both compute the same. Both take turns within one
process, and the ratio is of the mean time from one step's beginning to the next one's, within a round. Peak
memory is that of a process of its own for each, over the peak of one that only builds the parent.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _lab import MODEL, save_json, table
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_ext import trainers
from hf_ext.data import load_docstrings, load_preferences, load_prompts

ROWS = 64


def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@dataclass(frozen=True)
class Arm:
    """One trainer with its config, settings, data and further arguments."""

    trainer: Any
    config: Any
    settings: Mapping[str, Any]
    rows: Callable[[], Dataset]
    models: tuple[str, ...] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _texts() -> Dataset:
    return load_docstrings("train").select(range(ROWS)).select_columns(["prompt", "completion"])


def _pairs() -> Dataset:
    rows = load_preferences("docstring", "validation", count=ROWS)
    return rows.select_columns(["prompt", "chosen", "rejected"])


def _negatives() -> Dataset:
    return _pairs().map(lambda row: {"anchors": [row["chosen"]]}).remove_columns("chosen")


def _prompts() -> Dataset:
    return load_prompts("copying", count=ROWS).select_columns(["prompt", "completion"])


def _same(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


_SFT = Arm(SFTTrainer, SFTConfig, {}, _texts)
_ON_POLICY = {"max_completion_length": 16}
PAIRS: dict[str, tuple[Arm, Arm]] = {
    "self_distillation, weight 0": (
        _SFT,
        Arm(trainers.SelfDistillationTrainer, trainers.SelfDistillationConfig, {"pskd_alpha": 0.0}, _texts),
    ),
    "unlearning, gradient ascent": (
        _SFT,
        Arm(
            trainers.UnlearningTrainer,
            trainers.UnlearningConfig,
            {"unlearn_loss": "ga", "retain_loss": "none", "max_forget_loss": 1e6},
            _texts,
        ),
    ),
    "d2o, one anchor": (
        Arm(DPOTrainer, DPOConfig, {}, _pairs),
        Arm(trainers.D2OTrainer, trainers.D2OConfig, {"num_anchors": 1, "online_after": None}, _negatives),
    ),
    "aligndistil, one teacher": (
        Arm(
            DistillationTrainer, DistillationConfig, {**_ON_POLICY, "beta": 1.0}, _prompts, ("teacher_model",)
        ),
        Arm(
            trainers.AlignDistilTrainer,
            trainers.AlignDistilConfig,
            {**_ON_POLICY, "on_policy": True, "teacher_type": "gkd", "loss_reduction": "token"},
            _prompts,
            ("dpo_model", "reverse_model"),
        ),
    ),
    "paced_distillation, uniform": (
        Arm(DistillationTrainer, DistillationConfig, _ON_POLICY, _prompts, ("teacher_model",)),
        Arm(
            trainers.PacedDistillationTrainer,
            trainers.PacedDistillationConfig,
            {**_ON_POLICY, "paced_alpha": 0.0, "paced_beta": 0.0, "stage_split": 0.0, "apply": "loss"},
            _prompts,
            ("teacher_model",),
            {"reward_funcs": _same},
        ),
    ),
}


class Clock(TrainerCallback):
    """Take the time at each step's beginning."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())


def build(arm: Arm, steps: int, folder: Path, clock: Clock) -> Any:
    """Return a trainer for some steps."""
    given: dict[str, Any] = {
        "max_steps": steps + 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 256,
        **arm.settings,
    }
    known = {field.name for field in dataclasses.fields(arm.config)}
    more = dict(arm.more)
    if arm.trainer is trainers.UnlearningTrainer:
        more["retain_dataset"] = None
    return arm.trainer(
        model=_model(),
        args=arm.config(str(folder), **{key: value for key, value in given.items() if key in known}),
        train_dataset=arm.rows(),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        callbacks=[clock],
        **{name: _model() for name in arm.models},
        **more,
    )


def seconds(arm: Arm, steps: int, folder: Path) -> float:
    """Return the mean seconds of a step, after a first that is not counted."""
    clock = Clock()
    build(arm, steps, folder, clock).train()
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def peak(name: str, which: int) -> int:
    """Return the peak resident bytes of a process that trains one of a pair for three steps."""
    code = (
        "import sys, tempfile, pathlib; sys.path.insert(0, sys.argv[1]); import trainer_step as t\n"
        "t.torch.set_num_threads(1); folder = pathlib.Path(tempfile.mkdtemp())\n"
        "t.seconds(t.PAIRS[sys.argv[2]][int(sys.argv[3])], 3, folder)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print('PEAK', next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, here, name, str(which)], capture_output=True, text=True, check=True
    )
    return 1024 * int(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("PEAK")))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="pairs to measure, by how their names begin")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        name for name in PAIRS if options.only is None or name.startswith(tuple(options.only.split(",")))
    ]
    results: dict[str, Any] = {}
    for name in chosen:
        taken: list[list[float]] = [[], []]
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(options.rounds + 1):
                for which in (0, 1) if turn % 2 else (1, 0):
                    found = seconds(PAIRS[name][which], options.steps, Path(folder))
                    if turn:  # the first round warms up
                        taken[which].append(found)
        ratios = [ours / theirs for theirs, ours in zip(*taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory = [peak(name, which) for which in (0, 1)]
        results[name] = {
            "parent": PAIRS[name][0].trainer.__name__,
            "seconds": statistics.median(taken[1]),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
            "ratio_of_fastest": min(taken[1]) / min(taken[0]),
            "peak_ratio": memory[1] / memory[0],
        }
        print(
            name, {k: v if isinstance(v, str) else round(v, 4) for k, v in results[name].items()}, flush=True
        )
    keys = ("seconds", "ratio", "ratio_q1", "ratio_q3", "ratio_of_fastest", "peak_ratio")
    rows = [[name, row["parent"], *(f"{row[key]:.4f}" for key in keys)] for name, row in results.items()]
    heads = [
        "trainer",
        "parent",
        "seconds",
        "ratio",
        "lower quartile",
        "upper",
        "of the fastest",
        "peak memory",
    ]
    print(table(rows, heads))
    if options.out:
        save_json(options.out, {"rounds": options.rounds, "steps": options.steps, "pairs": results})


if __name__ == "__main__":
    main()
