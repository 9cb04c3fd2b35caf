"""Predict the final loss of a cosine run from a run with a constant rate and a short anneal, then run it.

A small Llama (0.8 M parameters) is trained from random weights on (source, docstring) pairs, one pass. For
each seed: one run at a constant rate whose last fifth decays linearly (WSD), to which the law is fitted, and
one with a cosine, of which the law has seen nothing. Initial weights and data order are the same in both.

Reported beside it: the same law fitted to the constant part alone, which leaves C unknown. What it can say is
the loss of a constant schedule, or of the cosine with C = 0.

Run: python benchmarks/annealing_law.py [--out docs/assets/annealing_law.json] [--reuse FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _lab import LENGTH, MODEL, fit, functions, mean_and_spread, save_json, save_plot, table
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ext.callbacks import AnnealingLaw, AnnealingLawCallback, LossTrace, schedule_rates
from hf_ext.core.files import read_json

STEPS, WARMUP, BATCH, EVERY = 1200, 60, 4, 30
PEAK = 2e-3
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
SCHEDULES: dict[str, dict[str, Any]] = {
    "wsd": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": STEPS // 5, "decay_type": "linear"},
    },
    "cosine": {"lr_scheduler_type": "cosine"},
}


def run(schedule: str, seed: int, known: dict[str, Any] | None = None) -> LossTrace:
    """Train with a schedule, and return its rates with the held-out losses; `known` is an earlier output."""
    if known is not None:
        losses = known["seeds"][seed]["traces"][schedule]
        rates = schedule_rates(schedule, STEPS, PEAK, warmup_steps=WARMUP)
        values = torch.tensor(losses["losses"], dtype=torch.float64)
        return LossTrace(rates, torch.tensor(losses["steps"]), values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL, **SIZES), dtype=torch.float32)
    recorder = AnnealingLawCallback(resamples=1)
    text = functions()
    fit(
        text.train,
        text.test.select(range(64)),
        learning_rate=PEAK,
        seed=seed,
        max_steps=STEPS,
        batch_size=BATCH,
        callbacks=[recorder],
        model=model,
        eval_steps=EVERY,
        warmup_steps=WARMUP,
        **SCHEDULES[schedule],
    )
    return recorder.trace()


def before_anneal(trace: LossTrace) -> LossTrace:
    """Return the part of a run with a constant rate."""
    last = int((trace.rates == trace.rates.max()).nonzero()[-1, 0]) + 1
    kept = trace.steps <= last
    return dataclasses.replace(
        trace, rates=trace.rates[:last], steps=trace.steps[kept], losses=trace.losses[kept]
    )


def study(seed: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Fit, predict and run, for one seed."""
    known = run("wsd", seed, earlier)
    law = AnnealingLaw.fit(known, fit_lambda=True)
    cosine = schedule_rates("cosine", STEPS, PEAK, warmup_steps=WARMUP)
    curve, forecast = law.predict(cosine), law.forecast(cosine)
    constant = AnnealingLaw.fit(before_anneal(known), resamples=1)
    refused = ""
    try:
        constant.predict(cosine)
    except ValueError as error:
        refused = str(error)
    without = float(dataclasses.replace(constant, C=0.0).predict(cosine)[-1])
    measured = run("cosine", seed, earlier)
    final = float(measured.losses[-1])
    seen = measured.steps >= known.warmup + STEPS // 50
    ahead = curve[measured.steps[seen] - 1]
    off = float((ahead / measured.losses[seen] - 1).abs().mean()) * 100
    found = {
        "seed": seed,
        "fit": {k: v for k, v in law.to_json().items() if k not in ("draws", "context")},
        "measured": final,
        "predicted": forecast.loss,
        "interval": [forecast.low, forecast.high],
        "error_percent": 100 * (forecast.loss / final - 1),
        "curve_mean_abs_percent": off,
        "constant_run": float(known.losses[before_anneal(known).steps.numel() - 1]),
        "wsd_final": float(known.losses[-1]),
        "constant_only_refuses": refused,
        "constant_only_with_c_0": without,
        "constant_only_error_percent": 100 * (without / final - 1),
        "traces": {
            name: {"steps": trace.steps.tolist(), "losses": trace.losses.tolist()}
            for name, trace in (("wsd", known), ("cosine", measured))
        },
        "curve": {"steps": measured.steps.tolist(), "losses": curve[measured.steps - 1].tolist()},
    }
    print(
        f"seed {seed}: cosine measured {final:.4f}, predicted {forecast.loss:.4f} "
        f"[{forecast.low:.4f}, {forecast.high:.4f}], {found['error_percent']:+.2f} %; lam {law.lam}; "
        f"constant alone {found['constant_only_error_percent']:+.2f} %",
        flush=True,
    )
    return found


def main() -> None:
    """Run the study and write its JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reuse", type=Path, help="an earlier output: fit again to its runs, train nothing")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = time.perf_counter()
    earlier = None if options.reuse is None else read_json(options.reuse)
    studies = [study(seed, earlier) for seed in range(options.seeds)]
    content = {
        "what": "held-out loss of a cosine run, predicted from a run at a constant rate with a short anneal",
        "model": f"Llama, {SIZES}, random start",
        "tokens_per_step": BATCH * LENGTH,
        "steps": STEPS,
        "warmup_steps": WARMUP,
        "learning_rate": PEAK,
        "absolute_error_percent": mean_and_spread([abs(found["error_percent"]) for found in studies]),
        "constant_only_absolute_error_percent": mean_and_spread(
            [abs(found["constant_only_error_percent"]) for found in studies]
        ),
        "seeds": studies,
        "seconds": time.perf_counter() - start if earlier is None else earlier["seconds"],
    }

    rows = [
        [
            found["seed"],
            f"{found['measured']:.4f}",
            f"{found['predicted']:.4f}",
            f"{found['interval'][0]:.4f} to {found['interval'][1]:.4f}",
            f"{found['error_percent']:+.2f} %",
            f"{found['constant_only_error_percent']:+.2f} %",
        ]
        for found in studies
    ]
    print(table(rows, ["seed", "measured", "predicted", "90 % interval", "error", "constant alone, C = 0"]))
    if options.out is None:
        return
    save_json(options.out.with_suffix(".json"), content)

    def draw(axes: Any) -> None:
        for index, found in enumerate(studies):
            for name, color in (("wsd", "tab:gray"), ("cosine", "tab:blue")):
                trace = found["traces"][name]
                label = {"wsd": "WSD, fitted", "cosine": "cosine, measured"}[name] if index == 0 else None
                axes.plot(trace["steps"], trace["losses"], ".", ms=3, color=color, label=label)
            curve = found["curve"]
            label = "cosine, predicted" if index == 0 else None
            axes.plot(curve["steps"][3:], curve["losses"][3:], color="tab:orange", lw=1, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_ylim(top=max(found["curve"]["losses"][3] for found in studies) + 0.1)
        axes.legend()

    save_plot(options.out.with_suffix(".png"), draw)


if __name__ == "__main__":
    main()
