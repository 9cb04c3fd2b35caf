"""QPiSSA: what quantization costs with and without it, in weights and in logits, by backend and by rounds.

Run: python benchmarks/qpissa.py [--ranks 16 64] [--rounds 1 2 3 4 5] [--out docs/assets/qpissa.json]

The embedded model is quantized by bitsandbytes (8-bit, nf4), torchao (int8) and HQQ (4-bit, groups of 64),
all linear layers but the head, and adapted with PiSSA in residual mode; nothing is trained. The error ratio
of a layer is ||W0 - Q - s B A||_F / ||W0 - Q(W0)||_F. The logit error is ||logits - exact|| over that of the
plainly quantized model, for 8 x 256 tokens of Python's standard library; the loss is that of the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_ext
from hf_ext.adapters import PissaConfig, qpissa_error_ratios
from hf_ext.data import corpus_text

ORIGINAL = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def build() -> Any:
    """Return the embedded model, fp32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(ORIGINAL, dtype=torch.float32).eval()


def swapped(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Return the model with each linear layer but the head replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            model.set_submodule(name, make(module))
    return model


def bitsandbytes_8bit() -> Any:
    """Return the model in LLM.int8()."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    return swapped(build(), make)


def bitsandbytes_nf4() -> Any:
    """Return the model in nf4, blocks of 64."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        new.support_avx512bf16_for_cpu = False  # its repacked weight cannot be read back
        return new.to("cpu")

    return swapped(build(), make)


def torchao_int8() -> Any:
    """Return the model with int8 weights, one scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = build()
    quantize_(model, config.get_apply_tensor_subclass(), filter_fn=lambda _, name: name.endswith("_proj"))
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": config})()
    return model


def hqq_4bit() -> Any:
    """Return the model in HQQ's 4 bits, groups of 64."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(linear: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")

    return swapped(build(), make)


BACKENDS = (bitsandbytes_nf4, hqq_4bit, bitsandbytes_8bit, torchao_int8)


def tokens() -> Tensor:
    """Return 8 x 256 tokens of real text."""
    tokenizer = AutoTokenizer.from_pretrained(ORIGINAL)
    ids: list[int] = []
    for file in corpus_text("test"):
        ids += tokenizer(file.text).input_ids
        if len(ids) >= 8 * 256:
            break
    return torch.tensor(ids[: 8 * 256]).reshape(8, 256)


@torch.no_grad()
def evaluated(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Return logits and loss."""
    out = model.eval()(input_ids=ids, labels=ids)
    return out.logits.float(), float(out.loss)


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = tokens()
    exact, loss = evaluated(build(), ids)
    result: dict[str, Any] = {"loss": loss, "threads": options.threads, "backends": {}}
    for quantized in BACKENDS:
        plain, plain_loss = evaluated(quantized(), ids)
        rows = []
        print(f"{quantized.__name__}: loss {plain_loss:.4f}, of the original {loss:.4f}")
        for r in options.ranks:
            for rounds in options.rounds:
                config = PissaConfig(
                    r=r,
                    target_modules=LINEAR,
                    base_mode="residual",
                    original_weights=str(ORIGINAL),
                    qpissa_iters=rounds,
                    task_type="CAUSAL_LM",
                )
                model = quantized()
                start = time.perf_counter()
                adapted = get_peft_model(model, config)
                seconds = time.perf_counter() - start
                ratios = list(qpissa_error_ratios(adapted).values())
                logits, own_loss = evaluated(adapted, ids)
                row = {
                    "r": r,
                    "rounds": rounds,
                    "error_ratio": statistics.mean(ratios),
                    "largest_error_ratio": max(ratios),
                    "logit_error_ratio": float((logits - exact).norm() / (plain - exact).norm()),
                    "loss": own_loss,
                    "seconds": seconds,
                }
                rows.append(row)
                print("  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        error = float((plain - exact).norm() / exact.norm())
        result["backends"][quantized.__name__] = {
            "plain_loss": plain_loss,
            "plain_logit_error": error,
            "qpissa": rows,
        }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
