"""EVA's start against PEFT's `initialize_lora_eva_weights`, in seconds, peak memory and explained variance.

Run: python benchmarks/eva.py [--taus 0.99] [--rounds 3] [--out docs/assets/eva.json]

The model is a Llama with 4 layers of width 512 and random weights, adapted on all linear layers with r = 16
and rho = 2; the data are batches of 4 x 256 tokens of Python's standard library, in the tokens of the
embedded model. Both read the same batches and give out the same total rank.

PEFT goes round and round over its dataloader until every component that it hands out moves by less than its
tau allows (0.99 by default), and has no other bound: its forward passes are counted here. After
--max-forwards of them its tau is taken away, and it ends with the components that it has by then: its seconds
are then a lower bound. One process for each measurement, so that peak memory
(resident set) is its own; a process that only runs the batches through the base model, without logits
("forward"), shows what the rest costs.

The explained variance of a start is the sum over layers of tr(A C A^T) / tr(C), with the rows of A
orthonormal and C the exact fp64 covariance of the layer's inputs, over the most that any start of that total
rank and at most rho r per layer can explain.
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
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import EvaConfig as PeftEvaConfig
from peft.tuners.lora.eva import SVDHook
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_ext
from hf_ext.adapters import EvaConfig, initialize_from_data
from hf_ext.data import corpus_text

TOKENIZER = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
BATCH, LENGTH = 4, 256
OURS = ("forward", "eva", "eva sketch")


def build_model() -> LlamaForCausalLM:
    """Return the base model, in evaluation mode, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def build_batches(count: int) -> list[dict[str, Tensor]]:
    """Return batches of real text."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids: list[int] = []
    for file in corpus_text("train"):
        ids += tokenizer(file.text).input_ids
        if len(ids) >= count * BATCH * LENGTH:
            break
    rows = torch.tensor(ids[: count * BATCH * LENGTH]).reshape(count, BATCH, LENGTH)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in rows]


def measure(method: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Start one adapter in this process; write its A to a file and return what it took."""
    torch.set_num_threads(options.threads)
    model: Any = build_model()
    batches = build_batches(options.batches)
    forwards = 0
    common: dict[str, Any] = {"r": options.r, "target_modules": "all-linear"}
    if method.startswith("eva"):
        tokens, kind = options.batches * BATCH * LENGTH, "sketch" if "sketch" in method else "auto"
        config = EvaConfig(rho=options.rho, n_tokens=tokens, method=kind, **common)
        adapted: Any = get_peft_model(model, config)
    elif method.startswith("peft"):
        eva = PeftEvaConfig(rho=options.rho, tau=float(method.split()[1]))
        adapted = get_peft_model(model, LoraConfig(init_lora_weights="eva", eva_config=eva, **common))
    else:
        adapted = model
    finished = True

    def forward(module: nn.Module, batch: dict[str, Any]) -> Any:
        nonlocal forwards, finished
        forwards += 1
        if forwards >= options.max_forwards:
            finished = False
            for hook in (hook for m in module.modules() for hook in m._forward_hooks.values()):
                if isinstance(hook, SVDHook):
                    hook.sim_thresh = -1.0  # what it has now is taken
        return module(**batch)

    with torch.no_grad():
        model(**batches[0])  # warm
    before = time.perf_counter()
    if method.startswith("eva"):
        handle = model.register_forward_pre_hook(lambda *_: _count(counter))
        counter = [0]
        initialize_from_data(adapted, batches, show_progress=False)
        handle.remove()
        forwards = counter[0]
    elif method.startswith("peft"):
        initialize_lora_eva_weights(adapted, batches, forward_fn=forward, show_progress_bar=False)
    else:
        with torch.no_grad():
            for batch in batches:
                forward(model, {**batch, "logits_to_keep": 1})
    seconds = time.perf_counter() - before
    # Not getrusage: its maximum survives exec, and would be the parent's.
    status: str = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    if method != "forward":
        save_file(
            {
                path.removeprefix("base_model.model."): cast(Any, layer)
                .lora_A["default"]
                .weight.detach()
                .clone()
                for path, layer in adapted.named_modules()
                if isinstance(layer, LoraLayer)
            },
            out,
        )
    return {"seconds": seconds, "forwards": forwards, "peak_bytes": peak, "finished": finished}


def _count(counter: list[int]) -> None:
    counter[0] += 1


def _keep(parts: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    parts.append(args[0].flatten(0, 1))


def covariances(options: argparse.Namespace) -> dict[str, Tensor]:
    """Return the exact covariance of every linear layer's inputs, (d, d) fp64."""
    model: Any = build_model()
    held: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            held[name] = []
            module.register_forward_pre_hook(partial(_keep, held[name]))
    with torch.no_grad():
        for batch in build_batches(options.batches):
            model(**batch)
    for name, parts in held.items():
        rows = torch.cat(parts).double()
        rows -= rows.mean(0)
        sums[name] = rows.T @ rows
    return sums


def explained(rows: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, int]:
    """Return the explained variance, summed over layers, and the total rank."""
    total = sum(
        float(torch.trace(a.double() @ exact[name] @ a.double().T) / exact[name].trace())
        for name, a in rows.items()
    )
    return total, sum(len(a) for a in rows.values())


def most(exact: dict[str, Tensor], options: argparse.Namespace) -> float:
    """Return the most that any start of the same total rank explains."""
    each = round(options.rho * options.r)
    shares = [torch.linalg.eigvalsh(c).flip(0)[:each] / c.trace() for c in exact.values()]
    return float(torch.cat(shares).sort(descending=True).values[: options.r * len(exact)].sum())


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.99], help="PEFT's")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs of ours; PEFT's is run once")
    parser.add_argument("--max-forwards", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only[0], options, Path(options.only[1]))))
        return
    torch.set_num_threads(options.threads)
    exact = covariances(options)
    best = most(exact, options)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in (*OURS, *(f"peft {tau:g}" for tau in options.taus)):
            file = Path(folder, f"{method}.safetensors")
            runs = [_run(method, file) for _ in range(options.rounds if method in OURS else 1)]
            row = {**runs[-1], "seconds": statistics.median(run["seconds"] for run in runs)}
            if file.exists():
                value, rank = explained(load_file(file), exact)
                row |= {"explained": value / best, "total_rank": rank}
            table[method] = row
            print(method, row, flush=True)
    for method, row in table.items():
        row["seconds_ratio"] = row["seconds"] / table["eva"]["seconds"]
        row["peak_ratio"] = row["peak_bytes"] / table["eva"]["peak_bytes"]
        print(
            f"{method:12s} {row['seconds_ratio']:8.2f} of eva's seconds, {row['peak_ratio']:.2f} of its peak"
        )
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "only")}
        options.out.write_text(json.dumps({"settings": settings, "table": table}, indent=2) + "\n")


def _run(method: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", method, str(file)]
    # One malloc arena and no cached top: the peak is then the program's, not the allocator's.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=3600)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
