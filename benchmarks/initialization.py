"""Start of a principal-component adapter against PEFT's `init_lora_weights="pissa"`: time ratio and accuracy.

Run: python benchmarks/initialization.py [--size 2048] [--rank 32] [--out FILE]

One linear layer whose singular values are 1/sqrt(i), so that the exact answer is known by construction. Both
adapters are injected through `get_peft_model`; their runs take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_ext  # noqa: F401 (registers the adapter types)
from hf_ext.adapters import SorsaConfig


def matrix(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return U, the singular values 1/sqrt(i), V and their product."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    s = torch.arange(1, size + 1).float() ** -0.5
    return u, s, v, (u * s) @ v.T


def inject(weight: Tensor, config: Any) -> tuple[float, nn.Module]:
    """Return the seconds of the injection and the adapted layer."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    start = time.perf_counter()
    adapted = get_peft_model(model, config)
    return time.perf_counter() - start, adapted.base_model.model[0]


def largest_angle(found: Tensor, exact: Tensor) -> float:
    """Return the sine of the largest principal angle between two orthonormal bases, each (n, r)."""
    return float(
        torch.linalg.matrix_norm(found.double() - exact.double() @ (exact.double().T @ found.double()), 2)
    )


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3, help="runs of PEFT's; ours is run five times as often")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    r = options.rank
    u, s, v, weight = matrix(options.size)
    pissa = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights="pissa")
    pissa_niter = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights="pissa_niter_16")
    sorsa = SorsaConfig(r=r, target_modules=["0"])
    inject(weight, sorsa)  # first calls load LAPACK and warm the allocator
    theirs, niter, ours = [], [], []
    for _ in range(options.runs):
        theirs.append(inject(weight, pissa)[0])
        niter.append(inject(weight, pissa_niter)[0])
        ours.extend(inject(weight, sorsa)[0] for _ in range(5))
    _, layer = inject(weight, sorsa)
    found_u, found_s, found_v = layer.sorsa_B["default"], layer.sorsa_S["default"], layer.sorsa_A["default"].T
    result = {
        "size": options.size,
        "rank": r,
        "seconds_peft_pissa": statistics.median(theirs),
        "seconds_peft_pissa_niter_16": statistics.median(niter),
        "seconds_sorsa": statistics.median(ours),
        "times_faster_than_pissa": statistics.median(theirs) / statistics.median(ours),
        "times_faster_than_pissa_niter_16": statistics.median(niter) / statistics.median(ours),
        "singular_value_error": float(((found_s.detach() - s[:r]).abs() / s[:r]).max()),
        "left_subspace_error": largest_angle(found_u.detach(), u[:, :r]),
        "right_subspace_error": largest_angle(found_v.detach(), v[:, :r]),
    }
    for name, value in result.items():
        print(f"{name:36s} {value:.4g}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
