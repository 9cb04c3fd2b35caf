"""Time of a training step and peak memory of each trainer, as ratios to TRL's trainer that it extends.

Run: OMP_NUM_THREADS=1 python benchmarks/trainer_step.py [--pairs 30] [--blocks 6] [--warm-up 5]
     [--only NAME,...] [--no-memory] [--out docs/assets/trainer_step.json]

The embedded model, fp32, one thread, settings under which both compute the same, the same batches. Both take
turns within one process, a step each (`_pairing.py`); the median of the paired ratios is told with its
quartiles and its bootstrap interval, by wall and by processor time, and on which side of the bar the interval
is. Peak memory is that of a process of its own for each, over the parent's.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _lab import MODEL, save_json, table
from _pairing import COLUMNS, HEADS, Lane, compared, decides, in_turns
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
# Of the ratio to the parent's step.
BAR = 1.02


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
            ("dpo_model",),
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


def build(arm: Arm, steps: int, folder: Path, lane: TrainerCallback) -> Any:
    """Return a trainer for some steps."""
    given: dict[str, Any] = {
        "max_steps": steps,
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
        callbacks=[lane],
        **{name: _model() for name in arm.models},
        **more,
    )


def training(arm: Arm, folder: Path) -> Callable[[Lane, int], Any]:
    """Return what builds and runs a trainer for some steps."""
    return lambda lane, steps: build(arm, steps, folder, lane).train()


def peak(name: str, which: int) -> int:
    """Return the peak resident bytes of a process that trains one of a pair for three steps."""
    code = (
        "import sys, tempfile, pathlib; sys.path.insert(0, sys.argv[1]); import trainer_step as t\n"
        "t.torch.set_num_threads(1); folder = pathlib.Path(tempfile.mkdtemp())\n"
        "t.build(t.PAIRS[sys.argv[2]][int(sys.argv[3])], 3, folder, t.TrainerCallback()).train()\n"
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
    parser.add_argument("--pairs", type=int, default=30, help="of steps, in each block")
    parser.add_argument("--blocks", type=int, default=6, help="times that both loops are built")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--only", help="trainers to measure, by how their names begin")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        name for name in PAIRS if options.only is None or name.startswith(tuple(options.only.split(",")))
    ]
    results: dict[str, Any] = {}
    for name in chosen:
        parent, ours = PAIRS[name]
        with tempfile.TemporaryDirectory() as folder:
            theirs, own = (training(arm, Path(folder)) for arm in (parent, ours))
            figures = compared(in_turns(theirs, own, options.pairs, options.warm_up, options.blocks))
        results[name] = {
            "parent": parent.trainer.__name__,
            **figures,
            "bar": BAR,
            "is": decides(figures, BAR),
        }
        if not options.no_memory:
            memory = [peak(name, which) for which in (0, 1)]
            results[name]["peak_ratio"] = memory[1] / memory[0]
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in results[name].items()}
        print(name, shown, flush=True)
    rows = [
        [
            name,
            row["parent"],
            *(f"{row[key]:.4f}" for key in COLUMNS),
            row["is"],
            f"{row['peak_ratio']:.4f}" if "peak_ratio" in row else "",
        ]
        for name, row in results.items()
    ]
    print(table(rows, ["trainer", "parent", *HEADS, f"{BAR}", "peak memory"]))
    if options.out:
        save_json(options.out, {"pairs_of_steps": options.pairs, "trainers": results})


if __name__ == "__main__":
    main()
