"""LoRA-GA's start against PEFT's `init_lora_weights="lora_ga"`, in seconds and peak memory, and its quality.

Run: python benchmarks/lora_ga.py [--part narrow wide quality] [--rounds 3] [--out docs/assets/lora_ga.json]

The models are Llamas with random weights, 4 layers of width 512 ("narrow") and 1 of width 2048 ("wide"),
adapted on all linear layers with r = 8; the data are batches of 4 x 256 tokens of Python's standard library.
Both read the same batches once. PEFT:
`preprocess_loraga` with a forward and backward for each batch, then `get_peft_model`; its singular value
decompositions, `torch.svd_lowrank`, are part of that call. One process for each measurement, so that peak
memory (resident set) is its own; "forward" only runs the batches through the model, "inputs" adds the
gradients of the layers' inputs: what every such estimate needs before it begins. Seconds are the
processor's, on one thread, so that other processes hardly count. --out keeps the parts of an earlier run.

Quality, on the embedded model and real text: the residual ||G - G'||_F of the best G' of rank 2r within the
found singular vectors, over that of the best of all, by the number of passes; G by autograd.
"""

from __future__ import annotations

import argparse
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
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig as PeftLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_ext
from hf_ext.adapters import LoraGaConfig, initialize_from_data
from hf_ext.adapters._data_start import StartData
from hf_ext.adapters._gradient_sketch import GradientSketches
from hf_ext.data import corpus_text

EMBEDDED = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
BATCH, LENGTH = 4, 256
SIZES = {"narrow": (512, 1536, 4), "wide": (2048, 5504, 1)}  # width, of the MLP, layers
METHODS = ("forward", "inputs", "lora_ga", "lora_ga 2 passes", "lora_ga 3 passes", "peft")


def build_model(size: str) -> LlamaForCausalLM:
    """Return the base model, in evaluation mode, fp32."""
    torch.manual_seed(0)
    width, inner, layers = SIZES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def build_batches(count: int, rows: int = BATCH) -> list[dict[str, Tensor]]:
    """Return batches of real text."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids: list[int] = []
    for file in corpus_text("train"):
        ids += tokenizer(file.text).input_ids
        if len(ids) >= count * rows * LENGTH:
            break
    batches = torch.tensor(ids[: count * rows * LENGTH]).reshape(count, rows, LENGTH)
    return [{"input_ids": batch, "labels": batch} for batch in batches]


def run_batches(model: nn.Module, batches: list[dict[str, Tensor]], *, backward: bool) -> None:
    """Run the batches through the model, and the gradients back to its embeddings."""
    for batch in batches:
        if backward:
            model(**batch).loss.backward()
        else:
            with torch.no_grad():
                model(**batch)


def measure(method: str, options: argparse.Namespace) -> dict[str, float]:
    """Start one adapter in this process; return its seconds."""
    torch.set_num_threads(1)
    model, batches = build_model(options.size), build_batches(options.batches)
    run_batches(model, batches[:1], backward=False)  # warm
    rows = options.batches * BATCH
    before = time.process_time()
    if method == "peft":
        config = LoraConfig(
            r=options.r,
            lora_alpha=16,
            use_rslora=True,
            target_modules="all-linear",
            init_lora_weights="lora_ga",
            lora_ga_config=PeftLoraGAConfig(direction="ArB2r", scale="stable"),
        )
        # Its estimate does not resolve the shorthand.
        config.target_modules = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        preprocess_loraga(model, config, lambda: run_batches(model, batches, backward=True))
        get_peft_model(model, config)
    elif method.startswith("lora_ga"):
        passes = int(method.split()[1]) if " " in method else 1
        own = LoraGaConfig(r=options.r, target_modules="all-linear", n_samples=rows, n_passes=passes)
        adapted = get_peft_model(model, own)
        initialize_from_data(adapted, batches, show_progress=False)
    else:
        if method == "inputs":
            model.requires_grad_(False)
            model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        run_batches(model, batches, backward=method == "inputs")
    return {"seconds": time.process_time() - before}


def in_a_process(method: str, options: argparse.Namespace) -> dict[str, float]:
    """Return seconds and peak resident set of one measurement in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--measure", method, "--out", file.name, "--r", str(options.r)]
        command += ["--batches", str(options.batches), "--size", options.size]
        # One malloc arena and no cached top: the peak is then the program's, not the allocator's.
        env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
        subprocess.run(command, check=True, env=env, timeout=1200, capture_output=True)
        return json.loads(Path(file.name).read_text())


def quality(r: int, batches: list[dict[str, Tensor]], sketch: int | None, n_passes: int) -> list[float]:
    """Return for each linear layer of the embedded model the residual over the optimum."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("_proj")}
    for batch in batches:
        model(**batch).loss.backward()
    exact = {name: layer.weight.grad.double() / len(batches) for name, layer in layers.items()}
    data = StartData(model, "default", layers, None, batches, None, False)
    ranks = dict.fromkeys(layers, 2 * r)
    rows = sum(len(batch["labels"]) for batch in batches)
    found = GradientSketches(
        data, ranks=ranks, size=sketch, n_passes=n_passes, n_samples=rows, train_mode=False, seed=0
    )
    ratios = []
    for name, gradient in exact.items():
        u, _, vh = (tensor.double() for tensor in found.leading(name))
        best = torch.linalg.svdvals(gradient)[2 * r :].norm()
        ratios.append(float((gradient - u @ (u.T @ gradient @ vh.T) @ vh).norm() / best))
    return ratios


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and peaks of every method on one model, and what it holds of all gradients, in bytes."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for turn in range(options.rounds):
        for method in METHODS[turn % 6 :] + METHODS[: turn % 6]:
            runs[method].append(in_a_process(method, options))
    table = {}
    for method, rows in runs.items():
        ratios = [p["seconds"] / own["seconds"] for p, own in zip(runs["peft"], rows, strict=True)]
        table[method] = {
            "seconds": statistics.median(row["seconds"] for row in rows),
            "peak_bytes": statistics.median(row["peak_bytes"] for row in rows),
            "times_faster_than_peft": statistics.median(ratios),
        }
        print(
            f"{options.size} {method:18s} "
            + "  ".join(f"{name} {value:.4g}" for name, value in table[method].items()),
            flush=True,
        )
    shapes = [tuple(m.weight.shape) for m in build_model(options.size).modules() if isinstance(m, nn.Linear)]
    shapes = [shape for shape in shapes if shape[0] != 4096]  # the head
    ell = 12 * options.r
    return {
        "r": options.r,
        "batches": options.batches,
        "methods": table,
        "gradients_bytes": 4 * sum(m * n for m, n in shapes),
        "sketches_bytes": 4 * sum(min(m * n, m * ell + (2 * ell + 1) * n) for m, n in shapes),
    }


def qualities(r: int) -> list[dict[str, float]]:
    """Return the residual over the optimum by the number of passes, over the layers."""
    batches = build_batches(8, rows=8)
    table = []
    for passes in (1, 2, 3):
        ratios = quality(r, batches, None, passes)
        table.append({"passes": passes, "mean": statistics.mean(ratios), "largest": max(ratios)})
        print("quality  " + "  ".join(f"{name} {value:.4g}" for name, value in table[-1].items()))
    return table


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--part", choices=(*SIZES, "quality"), nargs="+", default=[*SIZES, "quality"])
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        result = measure(options.measure, options)
        status = Path("/proc/self/status").read_text()
        # Not getrusage: its maximum survives exec, and would be the parent's.
        result["peak_bytes"] = int(next(s.split()[1] for s in status.splitlines() if "VmHWM" in s)) * 1024
        options.out.write_text(json.dumps(result))
        return
    result: dict[str, Any] = {}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    for part in options.part:
        if part == "quality":
            result[part] = qualities(options.r)
        else:
            result[part] = compared(argparse.Namespace(**{**vars(options), "size": part}))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
