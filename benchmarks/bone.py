"""Bone against PEFT: its plain form against LoRA, its bat form against MiSS, in time and in peak memory.

Run: python benchmarks/bone.py [--rounds 15] [--out docs/assets/bone.json]

The model is a Llama with 12 layers of width 1024 and random weights, adapted on all linear layers, with
batches of 2 x 256 tokens, fp32:

- plain, r = 64, against LoRA of the rank nearest to as many trained parameters;
- bat, r = 64, against PEFT's MiSS with init_weights="bat" and the same r: the same function.

Two methods take turns within one process, and ratios are taken within each round. Peak memory needs a process
of its own for each method, and is given twice: as the resident set, libraries and allocator included ("base"
is the model that trains nothing), and as the bytes of all tensors alive at once in a step, which is what
`torch.cuda.max_memory_allocated` counts on a GPU; the latter with one sequence of 256 tokens and with two.

And a small regression task (alone with --effect). An MLP 32-128-128-10 is trained on a random teacher of its
own shape, then adapted for 200 Adam steps to the teacher with a rank-3 change (60 % of the norm) of its
hidden weights. The loss at the end is measured on other data, for each learning rate, mean of three runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, MissConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_ext.adapters import BoneConfig

R = 64
BATCH = (2, 256)
TOKEN_BATCHES = ((1, 256), (2, 256))
PAIRS = (("plain", "lora"), ("bat", "miss bat"))
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
METHODS = ("base", *(name for pair in PAIRS for name in pair))


def lora_rank() -> int:
    """Return the rank at which LoRA trains about as many numbers as plain Bone."""
    sides = [(1024, 1024)] * 4 + [(1024, 2816)] * 2 + [(2816, 1024)]  # (in_features, out_features)
    return round(R * sum(out for _, out in sides) / sum(a + b for a, b in sides))


def build(method: str) -> torch.nn.Module:
    """Return the model in training mode, fp32, with the method's adapter on all linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapters: dict[str, Any] = {
        "plain": lambda: BoneConfig(r=R, **common),
        "bat": lambda: BoneConfig(r=R, form="bat", **common),
        "lora": lambda: LoraConfig(r=lora_rank(), lora_alpha=lora_rank(), **common),
        "miss bat": lambda: MissConfig(r=R, init_weights="bat", **common),
    }
    return (get_peft_model(model, adapters[method]()) if method in adapters else model).train()


class Run:
    """One method's model, optimizer and data."""

    def __init__(self, method: str, batch: tuple[int, int] = BATCH) -> None:
        self.model = build(method)
        self.trained = [p for p in self.model.parameters() if p.requires_grad] if method != "base" else []
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0) if self.trained else None
        self.ids = torch.randint(0, self.model.config.vocab_size, batch)

    def step(self) -> float:
        """Take one training step and return its seconds."""
        start = time.perf_counter()
        if self.optimizer is None:
            with torch.no_grad():
                self.model(input_ids=self.ids, labels=self.ids)
            return time.perf_counter() - start
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def time_pair(ours: str, theirs: str, rounds: int) -> dict[str, Any]:
    """Return the median seconds of both and the quartiles of the ratio ours / theirs."""
    runs = {name: Run(name) for name in (ours, theirs)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run.step()
    for turn in range(rounds):
        for name in (ours, theirs) if turn % 2 else (theirs, ours):  # who comes after whom must not decide
            seconds[name].append(runs[name].step())
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "trained": {name: sum(p.numel() for p in run.trained) for name, run in runs.items()},
        "ratio": middle,
        "ratio_q1": low,
        "ratio_q3": high,
        "ratio_of_fastest": min(seconds[ours]) / min(seconds[theirs]),
    }


def mlp(generator: torch.Generator, gain: float = 1.0) -> torch.nn.Sequential:
    """Return a random MLP 32-128-128-10."""
    sizes = (32, 128, 128, 10)
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = torch.nn.Linear(a, b)
        linear.weight.data = gain * a**-0.5 * torch.randn(b, a, generator=generator)
        linear.bias.data.zero_()
        layers += [linear, torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1])


def fit(model: torch.nn.Module, teacher: torch.nn.Module, lr: float, steps: int, seed: int) -> float:
    """Train on batches of 256 random inputs, and return the loss on 4096 others."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = torch.randn(256, 32, generator=generator)
        with torch.no_grad():
            target = teacher(x)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        return float(F.mse_loss(model(x), teacher(x)))


def effect() -> dict[str, Any]:
    """Return for each method and learning rate the mean loss at the end, and the loss without adapting."""
    methods: dict[str, Any] = {
        "lora": lambda **common: LoraConfig(r=4, lora_alpha=4, **common),
        "plain": lambda **common: BoneConfig(r=4, **common),
        "bat": lambda **common: BoneConfig(r=4, form="bat", **common),
    }
    losses: dict[str, dict[str, list[float]]] = {m: {f"{lr:g}": [] for lr in RATES} for m in methods}
    starts: list[float] = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        teacher, student = mlp(generator, gain=2.0), mlp(generator)
        fit(student, teacher, lr=1e-3, steps=3000, seed=seed)
        for layer in (teacher[0], teacher[2]):
            change = torch.randn(128, 3, generator=generator) @ torch.randn(
                3, layer.weight.shape[1], generator=generator
            )
            layer.weight.data += 0.6 * layer.weight.norm() / change.norm() * change
        starts.append(fit(student, teacher, lr=0.0, steps=1, seed=100 + seed))
        for method, config in methods.items():
            for lr in RATES:
                model = get_peft_model(copy.deepcopy(student), config(target_modules=["0", "2"]))
                losses[method][f"{lr:g}"].append(fit(model, teacher, lr=lr, steps=200, seed=100 + seed))
    table = {m: {lr: statistics.mean(values) for lr, values in row.items()} for m, row in losses.items()}
    return {"without adapting": statistics.mean(starts), "loss": table}


def in_own_process(*arguments: str) -> str:
    """Run this file again with other arguments and return the last line that it prints."""
    # One malloc arena and no cached top: the peak is then the program's, not the allocator's.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=1800).stdout
    return out.strip().splitlines()[-1]


def peak_bytes() -> int:
    """Return this process's peak resident set, in bytes."""
    status = Path("/proc/self/status").read_text()
    # Not getrusage: its maximum survives exec, and would be the parent's.
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def tensor_bytes(run: Run) -> int:
    """Return the most bytes that tensors take at once in a step, with weights and optimizer state."""
    kept = [*run.model.parameters(), *run.model.buffers()]
    states = run.optimizer.state.values() if run.optimizer else ()
    kept += [value for state in states for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        tempfile.TemporaryDirectory() as folder,
    ):
        run.step()
        trace = Path(folder, "trace.json")
        profile.stop()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return sum(storages.values()) + max(itertools.accumulate(change for _, change in changes))


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--effect", action="store_true", help="the regression task alone")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--tensors-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--time-of", choices=[ours for ours, _ in PAIRS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.effect:
        print(json.dumps(effect(), indent=2))
        return
    if options.peak_of:
        run = Run(options.peak_of)
        for _ in range(2):  # the optimizer has its state from the second on
            run.step()
        print(peak_bytes())
        return
    if options.tensors_of:
        found = []
        for batch in TOKEN_BATCHES:
            run = Run(options.tensors_of, batch)
            run.step()  # the optimizer has its state from the second on
            found.append(tensor_bytes(run))
        print(json.dumps(found))
        return
    if options.time_of:
        print(json.dumps(time_pair(options.time_of, dict(PAIRS)[options.time_of], options.rounds)))
        return
    threads = ("--threads", str(options.threads))
    peaks = {method: int(in_own_process("--peak-of", method, *threads)) for method in METHODS}
    tensors = {
        method: json.loads(in_own_process("--tensors-of", method, *threads))
        for pair in PAIRS
        for method in pair
    }
    table: dict[str, Any] = {"peak_bytes": peaks, "tensor_bytes": tensors}
    print(f"r {R}, LoRA rank {lora_rank()}, {options.rounds} rounds, {options.threads} threads")
    for method, peak in peaks.items():
        print(
            f"{method:9s} peak {peak / 2**20:7.0f} MiB, {(peak - peaks['base']) / 2**20:6.0f} above the base"
        )
    for ours, theirs in PAIRS:
        # A process of its own for each pair: two models of 150 M parameters at a time, not four.
        row = json.loads(in_own_process("--time-of", ours, "--rounds", str(options.rounds), *threads))
        row["peak_ratio"] = peaks[ours] / peaks[theirs]
        row["peak_ratio_above_base"] = (peaks[ours] - peaks["base"]) / (peaks[theirs] - peaks["base"])
        row["tensor_ratios"] = [a / b for a, b in zip(tensors[ours], tensors[theirs], strict=True)]
        table[ours] = row
        print(
            f"{ours} / {theirs}: {row['seconds'][ours]:.2f} s / {row['seconds'][theirs]:.2f} s, "
            f"time ratio {row['ratio']:.3f} ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}), "
            f"peak ratio {row['peak_ratio']:.3f}, above the base {row['peak_ratio_above_base']:.3f}, "
            f"of tensors {', '.join(f'{ratio:.3f}' for ratio in row['tensor_ratios'])}"
        )
    table["effect"] = effect()
    print(json.dumps(table["effect"], indent=2))
    if options.out:
        settings = {"r": R, "lora_rank": lora_rank(), "rounds": options.rounds, "threads": options.threads}
        options.out.write_text(json.dumps({"settings": settings, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
