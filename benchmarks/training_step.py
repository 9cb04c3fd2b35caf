"""Training step of the adapters against PEFT LoRA at equal rank, in time and in peak memory, as ratios.

Run: python benchmarks/training_step.py [--model tiny-llama|llama-100m] [--rank 16] [--rounds 30]
     [--methods lora,loldu,...] [--out FILE]

The methods take turns within one process, so that a change of the machine's speed hits all of them alike; the
ratio is taken within each round. Peak memory (resident set) needs a process of its own for each method.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_ext
from hf_ext.adapters import BoneConfig, LolduConfig, LoraGaConfig, PissaConfig, SorsaConfig

ASSETS = Path(hf_ext.__file__).parent / "assets"
MODELS = {"tiny-llama": (8, 256), "llama-100m": (2, 256)}  # batch size, tokens
# A start that needs data is left out: it does not change the cost of a step.
METHODS = {
    "lora": lambda r: LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"),
    "pissa projected": lambda r: PissaConfig(r=r, target_modules="all-linear"),
    "pissa residual": lambda r: PissaConfig(r=r, target_modules="all-linear", base_mode="residual"),
    "sorsa projected": lambda r: SorsaConfig(r=r, target_modules="all-linear"),
    "sorsa residual": lambda r: SorsaConfig(r=r, target_modules="all-linear", base_mode="residual"),
    "lora_ga additive": lambda r: LoraGaConfig(r=r, target_modules="all-linear", init_weights=False),
    "loldu": lambda r: LolduConfig(r=r, target_modules="all-linear"),
    "bone plain": lambda r: BoneConfig(r=r, target_modules="all-linear"),
}


def build(model_name: str, method: str, rank: int) -> torch.nn.Module:
    """Return the model with an adapter on all linear layers, in training mode, fp32."""
    torch.manual_seed(0)
    if model_name == "tiny-llama":
        model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-llama", dtype=torch.float32)
    else:
        config = LlamaConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            vocab_size=32000,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return get_peft_model(model, METHODS[method](rank)).train()


class Run:
    """One method's model, optimizer and data."""

    def __init__(self, model_name: str, method: str, rank: int) -> None:
        self.model = build(model_name, method, rank)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        batch, length = MODELS[model_name]
        self.ids = torch.randint(0, self.model.config.vocab_size, (batch, length))

    def step(self) -> float:
        """Take one training step and return its seconds."""
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def time_ratios(model_name: str, methods: list[str], rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return each method's median seconds and the quartiles of its ratio to the first, LoRA."""
    runs = {method: Run(model_name, method, rank) for method in methods}
    for run in runs.values():
        run.step()
        run.step()
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(rounds):
        # The order rotates: who comes after whom must not decide.
        first = turn % len(methods)
        for method in methods[first:] + methods[:first]:
            seconds[method].append(runs[method].step())
    table = {}
    for method in methods:
        ratios = [a / b for a, b in zip(seconds[method], seconds["lora"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[method] = {
            "seconds": statistics.median(seconds[method]),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
            "ratio_of_fastest": min(seconds[method]) / min(seconds["lora"]),
            "trained": sum(p.numel() for p in runs[method].model.parameters() if p.requires_grad),
        }
    return table


def peak_bytes(model_name: str, method: str, rank: int) -> int:
    """Return the peak resident set of a process that takes five steps, in bytes."""
    command = [sys.executable, __file__, "--model", model_name, "--rank", str(rank), "--peak-of", method]
    # One malloc arena and no cached top: the peak is then the program's, not the allocator's.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=1200).stdout
    return int(out.strip().splitlines()[-1])


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny-llama")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--methods", default=",".join(METHODS), help="the first is the baseline, lora")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        run = Run(options.model, options.peak_of, options.rank)
        for _ in range(5):
            run.step()
        status = Path("/proc/self/status").read_text()
        # Not getrusage: its maximum survives exec, and would be the parent's.
        print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024)
        return
    methods = options.methods.split(",")
    if methods[0] != "lora" or not set(methods) <= set(METHODS):
        parser.error(f"--methods begins with lora; known are {', '.join(METHODS)}")
    table = time_ratios(options.model, methods, options.rank, options.rounds)
    peaks = {method: peak_bytes(options.model, method, options.rank) for method in methods}
    print(f"{options.model}, rank {options.rank}, {options.rounds} rounds, {options.threads} threads")
    for method, row in table.items():
        row["peak_bytes"] = peaks[method]
        row["peak_ratio"] = peaks[method] / peaks["lora"]
        print(
            f"{method:16s} {row['seconds'] * 1e3:8.1f} ms  time ratio {row['ratio']:.3f} "
            f"({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})  peak {peaks[method] / 2**20:7.0f} MiB "
            f"ratio {row['peak_ratio']:.3f}"
        )
    if options.out:
        options.out.write_text(
            json.dumps({"settings": vars(options) | {"out": None}, "table": table}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
