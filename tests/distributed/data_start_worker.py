"""Starts from data on two gloo processes with half of the data each; started by torchrun.

Usage: torchrun --nproc_per_node 2 -m tests.distributed.data_start_worker OUT
Writes OUT/<case>.rank<k>.safetensors with the adapter's tensors, and OUT/errors.rank<k>.json with what each
process was told where the data of one of them were unfit.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_ext.adapters import EvaConfig, LoraGaConfig, awaits_data, get_eva_state_dict, initialize_from_data
from tests.conftest import build_tiny_llama
from tests.distributed.launch import leave

IDS = torch.arange(8 * 12).reshape(8, 12) * 7 % 256
LABELS = IDS.masked_fill(torch.arange(8)[:, None] > torch.arange(12), -100)  # rows count differently
ALL = "all-linear"


class Routed(nn.Module):
    """Sends rows with a first entry above 0 to one expert, the others to the other; a third is unused."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.reshape(-1, 8), torch.zeros(x.numel() // 8, 8)
        for i, chosen in enumerate((rows[:, 0] > 0, rows[:, 0] <= 0)):
            if chosen.any():
                out[chosen] = self.experts[i](rows[chosen])
        return self.first(out)


def routed_rows() -> Tensor:
    """Return inputs of which the first half goes to one expert, and the second to the other."""
    x = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(1))
    x[..., 0] = x[..., 0].abs() * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    return x


def share(tensor: Tensor) -> Tensor:
    """Return this process's half; all of it in one process."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else tensor


def llama_batches() -> list[dict[str, Tensor]]:
    """Return this process's batches."""
    return [
        {"input_ids": i, "labels": y}
        for i, y in zip(share(IDS).split(2), share(LABELS).split(2), strict=True)
    ]


def eva(**options: Any) -> Callable[[], nn.Module]:
    """Return what starts EVA on the small Llama."""

    def run() -> nn.Module:
        config = EvaConfig(r=3, n_tokens=96, target_modules=ALL, **options)
        return start(get_peft_model(build_tiny_llama(), config), llama_batches())

    return run


def eva_on_a_data_set() -> nn.Module:
    """Start EVA from a data set, which is shared out by the call itself."""
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": LABELS.tolist()})
    config = EvaConfig(r=3, n_tokens=96, target_modules=ALL)
    return start(get_peft_model(build_tiny_llama(), config), data)


def eva_on_experts(**options: Any) -> Callable[[], nn.Module]:
    """Return what starts EVA where each process's data reach one expert only."""

    def run() -> nn.Module:
        config = EvaConfig(
            r=2, rho=1.5, n_tokens=10**4, target_modules=r"first|experts\.\d", min_rank=1, **options
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no token reached")
            return start(get_peft_model(Routed(), config), [{"x": share(routed_rows())}])  # type: ignore[arg-type]

    return run


def lora_ga(**options: Any) -> Callable[[], nn.Module]:
    """Return what starts LoRA-GA on the small Llama."""

    def run() -> nn.Module:
        config = LoraGaConfig(r=3, n_samples=8, target_modules=ALL, **options)
        return start(get_peft_model(build_tiny_llama(), config), llama_batches())

    return run


def start(model: Any, data: Any) -> nn.Module:
    """Give the adapter its start."""
    return initialize_from_data(model, data, show_progress=False)


CASES: dict[str, Callable[[], nn.Module]] = {
    "eva": eva(),
    "eva-rho1": eva(rho=1.0),
    "eva-sketch": eva(method="sketch", oversample=8),
    "eva-one-pass": eva(method="sketch", oversample=40, n_passes=1, rho=1.0),
    "eva-data-set": eva_on_a_data_set,
    "eva-experts": eva_on_experts(),
    "eva-experts-sketch": eva_on_experts(method="sketch", oversample=5),
    "lora_ga": lora_ga(),
    "lora_ga-two-passes": lora_ga(n_passes=2),
    "lora_ga-residual": lora_ga(base_mode="residual"),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors."""
    return {k: v.detach().clone().contiguous() for k, v in get_peft_model_state_dict(model).items()}


def peft_rows() -> dict[str, Tensor]:
    """Return the rows for PEFT's own EVA."""
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=3, init_lora_weights="eva", target_modules=ALL))
    rows = get_eva_state_dict(model, llama_batches(), EvaConfig(r=3, n_tokens=96), show_progress=False)
    return {name: a.clone() for name, a in rows.items() if len(a)}


def errors(rank: int) -> dict[str, str]:
    """Return what this process is told where the data of the second one are unfit."""
    told = {}
    unfit: dict[str, list[Any]] = {
        "nothing": [],
        "no mapping": [IDS],
        "no tokens": [{"input_ids": IDS + 10**6, "labels": LABELS}],
    }
    for kind, config in (
        ("eva", EvaConfig(r=3, n_tokens=96, target_modules=ALL)),
        ("lora_ga", LoraGaConfig(r=3, n_samples=8, target_modules=ALL)),
    ):
        for name, batches in unfit.items():
            model: Any = get_peft_model(build_tiny_llama(), config)
            try:
                start(model, llama_batches() if rank == 0 else batches)
            except (ValueError, IndexError) as error:
                told[f"{kind}, {name}"] = f"{type(error).__name__}: {error}"
            assert awaits_data(model) == ["default"]
            start(model, llama_batches())  # both processes go on together
    model = get_peft_model(build_tiny_llama(), EvaConfig(r=3, n_tokens=96, target_modules=ALL))
    try:
        start(model, [{"input_ids": IDS[:1, :2]}])  # two tokens on each: too few in all
    except ValueError as error:
        told["eva, too few"] = str(error)
    return told


def main() -> None:
    """Run all cases."""
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    for case, run in CASES.items():
        torch.manual_seed(1000 + rank)  # a start that used global seeds would differ between processes
        save_file(state(run()), out / f"{case}.rank{rank}.safetensors")
    save_file(peft_rows(), out / f"peft-rows.rank{rank}.safetensors")
    (out / f"errors.rank{rank}.json").write_text(json.dumps(errors(rank)))
    leave()


if __name__ == "__main__":
    main()
