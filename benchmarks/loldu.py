"""LoLDU: cost of its start, its size, and what its directions are worth.

Run: python benchmarks/loldu.py [--part start|size|effect ...] [--out docs/assets/loldu.json]

- start: truncated LU against `torch.linalg.lu`, 4096 x 4096, r = 64.
- size: trained parameters and checkpoint bytes of LoRA and LoLDU at equal rank.
- effect: a network trained on one teacher is adapted to another by 64 numbers, and, as a control, by as many
  between random directions of the same lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ext.adapters import LolduConfig
from hf_ext.core.lu import truncated_lu

# Start --------------------------------------------------------------------------------------------


def start_seconds(size: int = 4096, r: int = 64, runs: int = 3) -> dict[str, dict[str, float]]:
    """Return for one and for two threads the median seconds of both factorizations and their ratio."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    table = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        truncated_lu(weight, r)
        ours = statistics.median(seconds(lambda: truncated_lu(weight, r)) for _ in range(5 * runs))
        full = statistics.median(seconds(lambda: torch.linalg.lu(weight.double())) for _ in range(runs))
        table[f"{threads} threads"] = {"truncated": ours, "full": full, "times_faster": full / ours}
    return table


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# Size ---------------------------------------------------------------------------------------------


def sizes(rank: int) -> dict[str, dict[str, dict[str, int]]]:
    """Return the trained numbers and the bytes of a checkpoint, for LoRA and LoLDU of equal rank."""
    from training_step import MODELS, build  # beside this script

    table: dict[str, dict[str, dict[str, int]]] = {}
    for model_name in MODELS:
        table[model_name] = {}
        for method in ("lora", "loldu"):
            model: Any = build(model_name, method, rank)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                size = Path(folder, "adapter_model.safetensors").stat().st_size
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            table[model_name][method] = {"trained": trained, "bytes": size}
    return table


# Effect -------------------------------------------------------------------------------------------


def network(generator: torch.Generator) -> nn.Sequential:
    """Return a network 32-128-128-10 with normal weights of variance 2 / inputs, and no biases."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((32, 128), (128, 128), (128, 10)):
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = torch.randn(outputs, inputs, generator=generator) * (2.0 / inputs) ** 0.5
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit(student: nn.Module, teacher: nn.Module, steps: int, lr: float, generator: torch.Generator) -> None:
    """Take Adam steps on the squared error to the teacher, on fresh normal inputs."""
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for _ in range(steps):
        x = torch.randn(256, 32, generator=generator)
        with torch.no_grad():
            target = teacher(x)
        (student(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def error(student: nn.Module, teacher: nn.Module) -> float:
    """Return the mean squared error on 4096 inputs that no training has seen."""
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return float((student(x) - teacher(x)).square().mean())


def changed(teacher: nn.Module, generator: torch.Generator) -> nn.Module:
    """Change both hidden weights by a matrix of rank 3 and 60 % of their norm, in place."""
    for index in (0, 2):
        weight = teacher[index].weight.data  # type: ignore[index]
        change = torch.randn(len(weight), 3, generator=generator) @ torch.randn(
            3, weight.shape[1], generator=generator
        )
        weight += 0.6 * float(weight.norm() / change.norm()) * change
    return teacher


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Replace the frozen factors by random ones with the same column and row lengths."""
    for layer in model.modules():
        if hasattr(layer, "loldu_L"):
            for container, dim in ((layer.loldu_L, 0), (layer.loldu_U, 1)):
                factor = container["default"].data  # type: ignore[index]
                noise = torch.randn(factor.shape, generator=generator)
                factor.copy_(noise * (factor.norm(dim=dim, keepdim=True) / noise.norm(dim=dim, keepdim=True)))


ADAPTATIONS = ("loldu", "loldu largest", "random directions", "lora r=4")


def small_run(
    repetition: int,
    steps: int = 200,
    lr: float = 0.1,
    r: int = 32,
    methods: tuple[str, ...] = ADAPTATIONS,
) -> dict[str, float]:
    """Return the error before adapting, and after it with each method.

    Args:
        repetition: Seed of the teacher, its change, and all inputs.
        steps: Adam steps of each adaptation.
        lr: Learning rate of LoLDU and its control; LoRA has 0.01.
        r: Rank of LoLDU; LoRA has 4.
        methods: Which of `ADAPTATIONS` to run.
    """

    def draw(what: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * repetition + what)

    teacher, base = network(draw(0)), network(draw(1))
    fit(base, teacher, 600, 3e-3, draw(2))
    teacher = changed(teacher, draw(3))
    result = {"start": error(base, teacher)}
    for method in methods:
        torch.manual_seed(repetition)
        weights = network(draw(1))
        weights.load_state_dict(base.state_dict())
        selection = "largest" if method.endswith("largest") else "leading"
        config: Any = LolduConfig(r=r, selection=selection, target_modules=["0", "2"])
        if method.startswith("lora"):
            config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"])
        model: Any = get_peft_model(weights, config)  # type: ignore[arg-type]
        if method.startswith("random"):
            randomize(model, draw(4))
        fit(model, teacher, steps, 0.01 if method.startswith("lora") else lr, draw(5))
        result[method] = error(model, teacher)
    return result


def effect(repetitions: int = 3) -> dict[str, Any]:
    """Return the small run's errors at several learning rates, one list entry for each repetition."""
    table: dict[str, Any] = {}
    for lr in (0.1, 0.03, 0.01):
        results = [small_run(repetition, lr=lr) for repetition in range(repetitions)]
        table[f"lr {lr}"] = {name: [result[name] for result in results] for name in results[0]}
    return table


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too, over those of earlier parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("start", "size", "effect"), nargs="+")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts = options.part or ["start", "size", "effect"]
    found: dict[str, Any] = {}
    if "start" in parts:
        found["start"] = start_seconds(r=options.rank)
    torch.set_num_threads(options.threads)
    if "size" in parts:
        found["size"] = sizes(options.rank)
    if "effect" in parts:
        found["effect"] = effect()
    print(json.dumps(found, indent=2))
    if options.out:
        earlier = json.loads(options.out.read_text()) if options.out.is_file() else {}
        options.out.write_text(json.dumps({**earlier, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
