"""Time of a training step with each callback, as a ratio to the Trainer without one.

Run: OMP_NUM_THREADS=1 python benchmarks/callback_step.py [--pairs 20] [--blocks 6] [--warm-up 5]
     [--only NAME ...] [--ending NAME] [--profile-only] [--profiled 40] [--out docs/assets/callback_step.json]

The embedded model with batches of 8 x 128 tokens, AdamW, fp32, one thread; all weights are trained, or, in
the arms whose names end in ", LoRA", a LoRA of PEFT alone (r = 16, all linear layers), and in those that end
in ", LoRA, 110 M", that of a random Llama of 110 M parameters (`training_step.py`). Arms whose names end in
", 8 x 1024" have batches of so many tokens: TRL's defaults (`per_device_train_batch_size` and `max_length` of
`SFTConfig`). Each callback takes turns with a run of the same weights without one within one process, a step
each (`_pairing.py`); the arms "plain" are two runs without one, and show what the measurement itself can tell
apart. Beside it stands what the ratio would be if the callback cost nothing but the time in its own
functions, from a profile (`_inside.py`); with `--profile-only` that alone. With `--only` or `--ending` the
file of `--out` keeps its other rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _inside import Profile
from _lab import embedded_model, fit, functions, save_json, table
from _pairing import COLUMNS, HEADS, compared, decides, in_turns
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training_step import build
from transformers import TrainerCallback

import hf_ext
from hf_ext import callbacks

# Of the ratio to the step without the callback.
BAR = 1.005
PLAIN = "plain"
# Ends the names of arms that train an adapter.
LORA = ", LoRA"
LARGE = ", LoRA, 110 M"
# Ends the names of arms with batches of TRL's default size.
LONG = ", 8 x 1024"
LENGTH = 1024
ARMS: dict[str, Any] = {
    PLAIN: list,
    "infinite_lr": lambda: [callbacks.InfiniteLRCallback()],
    "refined_linear_decay": lambda: [callbacks.RefinedLinearDecayCallback(record=False)],
    "refined_linear_decay, recording": lambda: [callbacks.RefinedLinearDecayCallback(record=True)],
    "annealing_law": lambda: [callbacks.AnnealingLawCallback()],
    "adaptive_batch_size, a test in 1000 updates": lambda: [_adaptive(1000)],
    "adaptive_batch_size, a test in 10 updates": lambda: [_adaptive(10)],
    "adaptive_batch_size, a test in every update": lambda: [_adaptive(1)],
    "hypergradient, rounds of 10": lambda: [callbacks.HypergradientCallback(local_steps=10)],
    "continual_ema": lambda: [callbacks.ContinualEMACallback()],
    "stage_recovery, recording": lambda: [callbacks.StageRecoveryCallback()],
    PLAIN + LORA: list,
    "adaptive_batch_size, a test in every update" + LORA: lambda: [_adaptive(1)],
    "continual_ema" + LORA: lambda: [callbacks.ContinualEMACallback()],
    PLAIN + LARGE: list,
    "adaptive_batch_size, a test in every update" + LARGE: lambda: [_adaptive(1)],
    "continual_ema" + LARGE: lambda: [callbacks.ContinualEMACallback()],
    PLAIN + LONG: list,
    "refined_linear_decay, recording" + LONG: lambda: [callbacks.RefinedLinearDecayCallback(record=True)],
    "adaptive_batch_size, a test in every update" + LONG: lambda: [_adaptive(1)],
    "continual_ema" + LONG: lambda: [callbacks.ContinualEMACallback()],
    PLAIN + LORA + LONG: list,
    "continual_ema" + LORA + LONG: lambda: [callbacks.ContinualEMACallback()],
}


def _adaptive(interval: int) -> Any:
    # A tolerance that no noise reaches: the batch stays as it is.
    return callbacks.AdaptiveBatchSizeCallback(batch_max=16, eta=1e9, test_interval=interval)


def _setting(arm: str) -> str:
    """Return the ending of an arm's name: which model is trained, and in which batches."""
    return next((end for end in (LARGE, LORA + LONG, LORA, LONG) if arm.endswith(end)), "")


def _rows(arm: str) -> Dataset:
    short = functions().train
    if LONG not in _setting(arm):
        return short
    stream = [token for row in short["input_ids"] for token in row]
    rows = [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _model(arm: str) -> Any:
    if _setting(arm) == LARGE:
        return build("llama-100m", "lora", 16)
    if LORA not in _setting(arm):
        return None
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(embedded_model(), settings)


def training(arm: str, folder: Path) -> Callable[[TrainerCallback, int], Any]:
    """Return what trains the embedded model with an arm's callbacks, after a given one, for some steps."""

    def train(first: TrainerCallback, steps: int) -> None:
        fit(
            _rows(arm),
            functions().validation,
            learning_rate=1e-5,
            seed=0,
            max_steps=steps,
            batch_size=4,
            callbacks=[first, *ARMS[arm]()],
            model=_model(arm),
            folder=folder,
            evaluate=False,
            gradient_accumulation_steps=2,
        )

    return train


def inside(arm: str, folder: Path, warm_up: int, steps: int) -> float:
    """Return 1 / (1 - s) for the share s of a step's processor time in the callback's own functions."""
    profile = Profile(warm_up, steps)
    training(arm, folder)(profile, warm_up + steps + 1)
    package = Path(hf_ext.__file__).parent
    return 1.0 / (1.0 - profile.share([package / "callbacks", package / "_compat", package / "core"]))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="of steps, in each block")
    parser.add_argument("--blocks", type=int, default=6, help="times that both loops are built")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="measure the arms whose names begin so; several times"
    )
    parser.add_argument("--ending", default="", metavar="NAME", help="and whose names end so")
    parser.add_argument("--profile-only", action="store_true", help="do not pair steps")
    parser.add_argument(
        "--profiled",
        type=int,
        default=40,
        help="steps of a profile, 10 or more: a test can be in each tenth",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts = tuple(options.only or [""])
    arms = [arm for arm in ARMS if arm.startswith(starts) and arm.endswith(options.ending)]
    results: dict[str, Any] = {}
    if (
        len(arms) < len(ARMS) and options.out and options.out.is_file()
    ):  # the other arms as they were measured
        results = json.loads(options.out.read_text(encoding="utf-8"))["callbacks"]
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            figures: dict[str, Any] = {}
            if not options.profile_only:
                plain, other = (training(which, Path(folder)) for which in (PLAIN + _setting(arm), arm))
                figures = compared(in_turns(plain, other, options.pairs, options.warm_up, options.blocks))
                figures |= {"bar": BAR, "is": decides(figures, BAR)}
            figures["inside"] = inside(arm, Path(folder), options.warm_up, options.profiled)
        results[arm] = figures
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in results[arm].items()}
        print(arm, shown, flush=True)
    columns = (*COLUMNS, "inside")
    measured = {arm: results[arm] for arm in arms}
    rows = [
        [arm, *(f"{row[key]:.4f}" if key in row else "" for key in columns), row.get("is", "")]
        for arm, row in measured.items()
    ]
    print(table(rows, ["callback", *HEADS, "by its own functions", f"{BAR}"]))
    if options.out:
        save_json(options.out, {"callbacks": results})


if __name__ == "__main__":
    main()
