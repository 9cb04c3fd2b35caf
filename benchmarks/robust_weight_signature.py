"""Robust weight signatures: noise robustness patched into a clean model, scaled, and taken off again.

Run: OMP_NUM_THREADS=1 python benchmarks/robust_weight_signature.py [--start other|same]

A network of six convolutions learns synthetic 16 x 16 patterns. From one start, pre-trained on clean inputs
of other patterns or of the same ones, come a clean model, a model trained on noisy inputs, and a second
clean model trained in another order. The signature of the first two (shallow layers, 8 bits) is put on the
second clean model with several strengths. Accuracy on clean and on noisy test inputs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _lab import mean_and_spread, save_json, save_plot, table
from torch import Tensor, nn

from hf_ext.core.files import write_tensors
from hf_ext.merging import SignaturePatch, extract_signature

DOCS = Path(__file__).resolve().parents[1] / "docs" / "assets"
SEEDS, CLASSES, NOISE = (0, 1, 2, 3), 10, 1.0
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEPT = (2, 6)


def network(seed: int) -> nn.Sequential:
    """Return six convolutions and a linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(((1, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=2 if index in (2, 4) else 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))


def templates(seed: int) -> Tensor:
    """Return one smooth pattern for each class, (classes, 1, 16, 16)."""
    coarse = torch.randn(CLASSES, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=True)


def batch(kinds: Tensor, count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return shifted patterns of random contrast with noise, and their classes."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = kinds[labels].roll(shift, dims=(2, 3)) * (
        0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    )
    return images + noise * torch.randn(images.shape, generator=generator), labels


def train(
    model: nn.Sequential, kinds: Tensor, noise: float, seed: int, steps: int, rate: float
) -> nn.Sequential:
    """Train in place on fresh batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        images, labels = batch(kinds, 64, noise, generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Sequential, kinds: Tensor, noise: float) -> float:
    """Return the share of right answers on 2000 test inputs."""
    generator = torch.Generator().manual_seed(12345)
    parts = [batch(kinds, 100, noise, generator) for _ in range(20)]
    return sum(float((model(x).argmax(dim=1) == y).float().mean()) for x, y in parts) / len(parts)


def copied(model: nn.Sequential) -> nn.Sequential:
    """Return a network with the same weights."""
    twin = network(0)
    twin.load_state_dict(model.state_dict())
    return twin


def main() -> None:
    """Run all seeds; write JSON, PNG and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", choices=("other", "same"), default="other")
    kind = parser.parse_args().start
    found: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[int, float] = {}
    for seed in SEEDS:
        kinds = templates(1000 + seed)

        def both(model: nn.Sequential, kinds: Tensor = kinds) -> tuple[float, float]:
            return accuracy(model, kinds, 0.1), accuracy(model, kinds, NOISE)

        start = train(
            network(seed), kinds if kind == "same" else templates(2000 + seed), 0.1, seed, 400, 1e-3
        )
        clean = train(copied(start), kinds, 0.1, 10 + seed, 300, 5e-4)
        robust = train(copied(start), kinds, NOISE, 20 + seed, 300, 5e-4)
        second = train(copied(start), kinds, 0.1, 30 + seed, 300, 5e-4)
        for name, model in (("clean", clean), ("robust", robust), ("second clean", second)):
            found.setdefault(name, []).append(both(model))
        with tempfile.TemporaryDirectory() as work:
            folders = [Path(work) / name for name in ("start", "clean", "robust")]
            for folder, model in zip(folders, (start, clean, robust), strict=True):
                write_tensors(folder / "model.safetensors", dict(model.state_dict()))
            order = list(start.state_dict())
            whole = sum(value.numel() * 4 for value in start.state_dict().values())
            before = {name: value.clone() for name, value in second.state_dict().items()}
            for keep in KEPT:
                for bits in (8, 4):
                    signature = extract_signature(
                        *folders, Path(work) / f"{keep}-{bits}", keep_num=keep, bits=bits, order=order
                    )
                    sizes.setdefault(keep, whole / signature.nbytes)
                    patch = SignaturePatch(second, [signature])
                    for alpha in ALPHAS[1:] if bits == 8 else ALPHAS[-1:]:
                        patch.scale(alpha)
                        found.setdefault(f"{keep} layers, {bits} bits, alpha {alpha}", []).append(
                            both(second)
                        )
                    patch.remove()
                    now = second.state_dict()
                    assert all(torch.equal(now[name], before[name]) for name in before)
        for name, values in found.items():
            print(f"{name:<32} clean {values[-1][0]:.4f} noisy {values[-1][1]:.4f}", flush=True)
    rows = {
        name: {
            side: mean_and_spread([v[index] for v in values]) for index, side in enumerate(("clean", "noisy"))
        }
        for name, values in found.items()
    }
    content = {"rows": rows, "times smaller than the weights": sizes, "noise": NOISE, "seeds": list(SEEDS)}
    suffix = "" if kind == "other" else "_same_start"
    save_json(DOCS / f"robust_weight_signature{suffix}.json", content)
    cells = [
        [name, *(f"{row[side]['mean']:.4f} ± {row[side]['std']:.4f}" for side in ("clean", "noisy"))]
        for name, row in rows.items()
    ]
    print(table(cells, ["model", "clean inputs", "noisy inputs"]))
    print(sizes)

    def draw(axes: Any) -> None:
        for keep in KEPT:
            for side, line in (("noisy", "-"), ("clean", ":")):
                arms = ["second clean", *(f"{keep} layers, 8 bits, alpha {alpha}" for alpha in ALPHAS[1:])]
                means = [rows[arm][side]["mean"] for arm in arms]
                axes.plot(ALPHAS, means, line, marker="o", label=f"{side}, {keep} layers")
        axes.axhline(
            rows["robust"]["noisy"]["mean"], color="gray", linestyle="--", label="noisy, robust model"
        )
        axes.set(xlabel="strength alpha", ylabel="accuracy")
        axes.legend(fontsize=8)

    save_plot(DOCS / f"robust_weight_signature{suffix}.png", draw)


if __name__ == "__main__":
    main()
