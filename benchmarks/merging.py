"""Merging against mergekit: time and peak anonymous memory, and how far the results agree.

Run: python benchmarks/merging.py --mergekit PYTHON [--params 254m|1b] [--work DIR] [--out FILE]

PYTHON is the interpreter of an environment with mergekit 0.1.5 (`pip install torch==2.13.0
mergekit==0.1.5`); it is left alone otherwise. Four models near one base, Llama shapes with random bf16
weights, are written to DIR once. Both programs run in processes of their own, in turns, with the same
number of threads; memory is RssAnon of /proc, sampled every 10 ms. TIES runs with scope "tensor",
mergekit's, and with the paper's "global", and linear merging is set against a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_ext.merging._checkpoint import Checkpoint  # noqa: E402
from hf_ext.merging._layout import plan_layout  # noqa: E402

SIZES = {
    "tiny": {"hidden": 64, "layers": 2, "inner": 176, "vocab": 500, "heads": 4, "kv": 2},
    "254m": {"hidden": 1024, "layers": 16, "inner": 2816, "vocab": 32000, "heads": 16, "kv": 8},
    "1b": {"hidden": 2048, "layers": 20, "inner": 5632, "vocab": 32000, "heads": 16, "kv": 8},
}
OURS = """
import json, sys, time
sys.path.insert(0, {root!r})
from hf_ext.merging import merge
start = time.perf_counter()
merge(sys.argv[1], sys.argv[2], progress=False)
print(json.dumps(time.perf_counter() - start))
"""


def shapes(size: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama."""
    hidden, inner = size["hidden"], size["inner"]
    narrow = hidden // size["heads"] * size["kv"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    for layer in range(size["layers"]):
        own = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden,
            inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        found.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()})
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (size["vocab"], hidden)}


def write_models(folder: Path, size: Mapping[str, int], count: int, dtype: torch.dtype) -> list[Path]:
    """Write a base and models near it, tensor by tensor; what is there already stays."""
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    layout = plan_layout([(key, name, shape) for key, shape in shapes(size).items()], 5 * 10**9)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size["hidden"],
        "intermediate_size": size["inner"], "num_hidden_layers": size["layers"], "vocab_size": size["vocab"],
        "num_attention_heads": size["heads"], "num_key_value_heads": size["kv"], "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    folders = [folder / f"m{number}" for number in range(count)]
    if all((path / "config.json").exists() for path in folders):
        return folders
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    files = [[(path / file.name).open("wb") for file in layout.files] for path in folders]
    for own in files:
        for handle, file in zip(own, layout.files, strict=True):
            handle.write(file.header)
    generator = torch.Generator().manual_seed(0)
    for slot in layout.slots.values():
        base = torch.randn(slot.shape, generator=generator) * 0.02
        for number, own in enumerate(files):
            tuned = base if not number else base + torch.randn(slot.shape, generator=generator) * 0.002
            handle = own[slot.file]
            handle.seek(slot.offset)
            handle.write(tuned.to(dtype).view(-1).view(torch.uint8).numpy().data)
    for path, own in zip(folders, files, strict=True):
        for handle in own:
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        if layout.index() is not None:
            (path / "model.safetensors.index.json").write_text(json.dumps(layout.index()))
        (path / "config.json").write_text(json.dumps(config))
    return folders


def anonymous(pid: int) -> int:
    """Return the anonymous resident memory of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measured(command: Sequence[str], threads: int) -> dict[str, float]:
    """Run a command and return its seconds, processor seconds, and peak anonymous memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{text[-3000:]}")
    last = text.strip().splitlines()[-1:] or [""]
    inner = float(last[0]) if last[0].replace(".", "").replace("e-", "").isdigit() else seconds
    return {"seconds": seconds, "seconds_without_start": inner, "cpu_seconds": cpu, "peak_bytes": peak}


@contextmanager
def config_file(content: Mapping[str, Any]) -> Iterator[Path]:
    """Give a YAML file with this content."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(dict(content), file)
    try:
        yield Path(file.name)
    finally:
        os.unlink(file.name)


def ours(content: Mapping[str, Any], out: Path, threads: int) -> dict[str, float]:
    """Merge with this library; `out` is replaced."""
    remove(out)
    with config_file({**content, "threads": threads}) as path:
        return measured([sys.executable, "-c", OURS.format(root=str(ROOT)), str(path), str(out)], threads)


def theirs(python: str, content: Mapping[str, Any], out: Path, threads: int) -> dict[str, float]:
    """Merge with mergekit; `out` is replaced."""
    remove(out)
    with config_file(content) as path:
        module = ["-m", "mergekit.scripts.run_yaml", str(path), str(out), "--no-copy-tokenizer"]
        return measured([python, *module, "--num-threads", str(threads)], threads)


def remove(folder: Path) -> None:
    """Remove a folder, and let what was written reach the disk before the next measurement."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def recipe(
    method: str, models: Sequence[Path], weight: float | None = 1.0, **parameters: Any
) -> dict[str, Any]:
    """Return a merge file that both programs read."""
    own = {} if weight is None else {"parameters": {"weight": weight}}
    named = [{"model": str(model), **own} for model in models[1:]]
    content: dict[str, Any] = {"merge_method": method, "models": named, "dtype": "bfloat16"}
    if method != "linear":
        content["base_model"] = str(models[0])
    return {**content, **({"parameters": parameters} if parameters else {})}


def speed(options: argparse.Namespace, models: Sequence[Path]) -> dict[str, Any]:
    """Measure TIES, and linear merging against a copy."""
    ties = recipe("ties", models, density=0.5)
    paper = {**ties, "parameters": {"density": 0.5, "scope": "global"}}
    tensor = {**ties, "parameters": {"density": 0.5, "scope": "tensor"}}
    found: dict[str, list[dict[str, float]]] = {}
    copies: list[float] = []
    linear = recipe("linear", models[:4])
    for _ in range(options.runs):
        runs = {
            "ties, scope tensor": lambda: ours(tensor, options.work / "out", options.threads),
            "ties, scope global": lambda: ours(paper, options.work / "out", options.threads),
            "linear": lambda: ours(linear, options.work / "out", options.threads),
        }
        if options.mergekit:
            runs["mergekit ties"] = lambda: theirs(
                options.mergekit, ties, options.work / "theirs", options.threads
            )
        for name, run in runs.items():
            found.setdefault(name, []).append(run())
            print(name, found[name][-1], flush=True)
        copies.append(copied(models[0], options.work / "copy"))
        print("copy, bytes read and written a second", copies[-1], flush=True)
    result: dict[str, Any] = {
        name: {
            "seconds": statistics.median(one["seconds"] for one in runs),
            "seconds_without_start": statistics.median(one["seconds_without_start"] for one in runs),
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in runs),
            "peak_mib": max(one["peak_bytes"] for one in runs) / 2**20,
        }
        for name, runs in found.items()
    }
    nbytes = sum(path.stat().st_size for model in models[1:4] for path in model.glob("*.safetensors"))
    moved = nbytes + nbytes / 3
    result["linear"]["bytes_a_second"] = moved / result["linear"]["seconds_without_start"]
    result["copy_bytes_a_second"] = statistics.median(copies)
    result["linear"]["of_copy"] = result["linear"]["bytes_a_second"] / result["copy_bytes_a_second"]
    if options.mergekit:
        whole = result["mergekit ties"]["seconds"]
        processors = result["mergekit ties"]["cpu_seconds"]
        named = [name for name in found if name.startswith("ties")]
        result["times_faster"] = {name: whole / result[name]["seconds"] for name in named}
        result["times_less_cpu"] = {name: processors / result[name]["cpu_seconds"] for name in named}
    return result


def copied(model: Path, target: Path) -> float:
    """Copy a model with the system's own tool, to the disk, and return bytes read and written in a second."""
    remove(target)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    nbytes = sum(path.stat().st_size for path in model.iterdir())
    remove(target)
    return 2 * nbytes / seconds


# Agreement --------------------------------------------------------------------------------------------------


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """Merge small fp32 models with both programs and compare the results."""
    models = write_models(options.work / "tiny", SIZES["tiny"], 4, torch.float32)
    slerp = recipe("slerp", [models[1], models[2]], None, t=0.3)
    slerp["models"] = [{"model": str(models[1])}, {"model": str(models[2])}]
    recipes = {
        "linear": recipe("linear", models, 0.7),
        "slerp": slerp,
        "task_arithmetic": recipe("task_arithmetic", models, 0.4, **{"lambda": 1.2}),
        "ties": recipe("ties", models, density=0.5),
        "ties, unequal weights": unequal(recipe("ties", models, density=0.5)),
        "dare_linear": recipe("dare_linear", models, 0.5, density=0.3),
        "dare_linear, density 1": recipe("dare_linear", models, 0.5, density=1.0),
        "dare_ties, density 1": recipe("dare_ties", models, 0.5, density=1.0),
    }
    result: dict[str, Any] = {}
    for name, content in recipes.items():
        content = {**content, "dtype": "float32"}
        own = {**content, "parameters": {**content.get("parameters", {})}}
        if name.startswith("ties"):
            own["parameters"]["compat"] = "mergekit"
        if name == "dare_linear":
            own["parameters"]["rescale"] = True
        ours(own, options.work / "out", 1)
        theirs(options.mergekit, content, options.work / "theirs", 1)
        found, wanted = tensors(options.work / "out"), tensors(options.work / "theirs")
        if name == "dare_linear":
            result[name] = statistics_of(found, wanted, tensors(models[0]))
        else:
            result[name] = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
        print(name, result[name], flush=True)
    return result


def unequal(content: dict[str, Any]) -> dict[str, Any]:
    """Give each model a weight of its own."""
    models = [{**m, "parameters": {"weight": 0.5 + i}} for i, m in enumerate(content["models"])]
    return {**content, "models": models}


def statistics_of(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return what two random masks must share: the share of changed entries and the L1 norm of the change."""
    changes = [torch.cat([(m[k] - base[k]).view(-1) for k in sorted(base)]) for m in (found, wanted)]
    return {
        "changed_ours": float((changes[0] != 0).float().mean()),
        "changed_theirs": float((changes[1] != 0).float().mean()),
        "l1_ratio": float(changes[0].abs().sum() / changes[1].abs().sum()),
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model."""
    found: dict[str, Tensor] = {}
    for path in Checkpoint(folder).files:
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def main() -> None:
    """Measure, print, and with --out write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--params", choices=["tiny", "254m", "1b"], default="254m")
    parser.add_argument(
        "--mergekit", metavar="PYTHON", help="interpreter that has mergekit; without it, ours alone"
    )
    parser.add_argument("--agreement", action="store_true", help="compare results instead of times")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/merging"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.agreement:
        if not options.mergekit:
            parser.error("--agreement needs --mergekit")
        result = {"largest_difference": agreement(options)}
    else:
        models = write_models(options.work / options.params, SIZES[options.params], 5, torch.bfloat16)
        numel = sum(torch.Size(shape).numel() for shape in shapes(SIZES[options.params]).values())
        result = {"parameters": numel, "threads": options.threads, **speed(options, models)}
    print(json.dumps(result, indent=2))
    if options.out:
        held = json.loads(options.out.read_text()) if options.out.exists() else {}
        held["agreement" if options.agreement else options.params] = result
        options.out.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
