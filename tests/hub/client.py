"""The client side: a process of its own that does what the tests ask for, one JSON line after the other.

Usage: python -m tests.hub.client FOLDER, with HF_ENDPOINT and the other variables set: huggingface_hub reads
them once, when it is imported. Each line {"call": name, ...} on standard input gives a line {"value": ...} or
{"error": [type, text]} on standard output. hf_ext is imported only by calls that need it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import _http

FOLDER = Path(sys.argv[1])
# The waits between huggingface_hub's own retries, which are five as ever.
_DEFAULTS = _http.http_backoff.__kwdefaults__
assert _DEFAULTS is not None
_DEFAULTS.update(base_wait_time=0.01, max_wait_time=0.02)


def logits(model: Any) -> dict[str, Any]:
    """Return the digest of a model's logits, bit for bit, and one number of them."""
    ids = (torch.arange(2 * 9).reshape(2, 9) * 7 + 3) % 250
    with torch.no_grad():
        out = model.eval()(input_ids=ids).logits.float().contiguous()
    return {"digest": hashlib.sha256(out.numpy().tobytes()).hexdigest(), "values": out[0, -1, :4].tolist()}


def moved(model: Any) -> Any:
    """Move the trained tensors away from where they start: equal logits then prove that they were loaded."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def base_model(**options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("me/base", **options)


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "hf_ext" / "assets" / "tiny-llama")


def sorsa(base: Any) -> Any:
    from peft import get_peft_model

    from hf_ext.adapters import SorsaConfig

    config = SorsaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return moved(get_peft_model(base, config))


# Calls ------------------------------------------------------------------------------------------------------


def push_base() -> dict[str, Any]:
    """Push the random Llama with a tokenizer."""
    from hf_ext.hub import push_to_hub
    from tests.conftest import build_tiny_llama

    words = tokenizer()
    model = build_tiny_llama(vocab_size=len(words))
    return {"url": push_to_hub(model, "me/base", tokenizer=words), **logits(model)}


def push_adapter(repo_id: str, upstream: bool = False, **options: Any) -> dict[str, Any]:
    """Push SORSA over me/base, by our function or by PEFT's, and keep what it computes."""
    from hf_ext.hub import push_to_hub

    base = base_model()
    before = logits(base)
    model = sorsa(base)
    found = {"base": before, **logits(model)}
    if upstream:
        model.push_to_hub(repo_id)
        return found
    words = tokenizer() if options.pop("with_tokenizer", False) else None
    return {"url": push_to_hub(model, repo_id, tokenizer=words, **options), **found}


def push_trained() -> dict[str, Any]:
    """Push an adapter whose base came from a folder, from a second name, beside another adapter."""
    from hf_ext.adapters import SorsaConfig
    from hf_ext.hub import push_to_hub

    base_model().save_pretrained(FOLDER / "local-base")
    from transformers import AutoModelForCausalLM

    model = sorsa(AutoModelForCausalLM.from_pretrained(FOLDER / "local-base"))
    model.add_adapter("second", SorsaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.set_adapter("second")
    url = push_to_hub(model, "me/second", adapter_name="second", private=True, revision="trial")
    return {"url": url, **logits(model)}


def push_native() -> dict[str, Any]:
    """Push the inactive one of two adapters that transformers' own `add_adapter` has made."""
    from hf_ext.adapters import SorsaConfig
    from hf_ext.hub import push_to_hub

    model = base_model()
    model.add_adapter(SorsaConfig(r=2, target_modules=["q_proj"], init_weights=False), "extra")
    found = logits(model)
    model.add_adapter(SorsaConfig(r=3, target_modules=["q_proj"], init_weights=False), "other")
    url = push_to_hub(model, "me/native", adapter_name="extra")
    return {"url": url, "active": model.active_adapters(), **found}


def push_lora_and_merged() -> dict[str, Any]:
    """Export an adapter and merge it; push both folders."""
    from hf_ext.adapters import export_to_lora
    from hf_ext.hub import push_to_hub

    model = sorsa(base_model())
    found = logits(model)
    export_to_lora(model, FOLDER / "lora")
    lora = push_to_hub(FOLDER / "lora", "me/lora")
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(FOLDER / "merged")
    tokenizer().save_pretrained(FOLDER / "merged")
    push_to_hub(FOLDER / "merged", "me/merged", base_model="me/base", method="sorsa, merged")
    return {"url": lora, "merged": logits(merged), **found}


def push_folder(folder: str, repo_id: str, **options: Any) -> str:
    """Push a folder."""
    from hf_ext.hub import push_to_hub

    return push_to_hub(FOLDER / folder, repo_id, **{"wait": 0.01, **options})


def make_folders() -> dict[str, str]:
    """Save an adapter as PEFT does, whose base came from a folder; return what the folder holds."""
    from transformers import AutoModelForCausalLM

    base_model().save_pretrained(FOLDER / "local-base")
    model = sorsa(AutoModelForCausalLM.from_pretrained(FOLDER / "local-base"))
    model.save_pretrained(FOLDER / "adapter")
    tokenizer().save_pretrained(FOLDER / "adapter")
    (FOLDER / "adapter" / "training_args.bin").write_bytes(b"a pickle")
    (FOLDER / "adapter" / "checkpoint-3").mkdir()
    (FOLDER / "adapter" / "checkpoint-3" / "optimizer.pt").write_bytes(b"not for readers")
    return {**logits(model), "path": str(FOLDER / "local-base")}


def train_with_trl() -> dict[str, Any]:
    """Train SORSA for two steps in TRL's SFTTrainer, which pushes each checkpoint and the end."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from hf_ext.adapters import SorsaConfig

    rows = ["def add(a, b): return a + b", "for i in range(3): print(i)", "import os", "x = [1, 2, 3]"]
    arguments = SFTConfig(
        output_dir=str(FOLDER / "sft"),
        hub_model_id="me/sft",
        push_to_hub=True,
        hub_strategy="every_save",
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=16,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=base_model(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
        peft_config=SorsaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.push_to_hub()
    return logits(trainer.model)


def load(repo_id: str, how: str, revision: str | None = None) -> dict[str, Any]:
    """Load from the Hub: "model", "auto" (AutoPeft), "plain" (PEFT without hf_ext) or "adapter"."""
    if how in ("auto", "adapter"):
        import hf_ext  # noqa: F401
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    if how == "model":
        model: Any = AutoModelForCausalLM.from_pretrained(repo_id)
    elif how == "auto":
        model = AutoPeftModelForCausalLM.from_pretrained(repo_id, revision=revision)
    else:
        model = PeftModel.from_pretrained(base_model(), repo_id, revision=revision)
    return {"hf_ext": "hf_ext" in sys.modules, "type": type(model).__name__, **logits(model)}


def run_snippet(code: str) -> dict[str, Any]:
    """Run the code of a card and return what its model computes."""
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    return {"tokens": names["tokenizer"]("def f(x):")["input_ids"], **logits(names["model"])}


CALLS: dict[str, Callable[..., Any]] = {
    call.__name__: call
    for call in (
        push_base,
        push_adapter,
        push_trained,
        push_native,
        push_lora_and_merged,
        push_folder,
        make_folders,
        train_with_trl,
        load,
        run_snippet,
    )
}


def main() -> None:
    """Answer calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": CALLS[asked.pop("call")](**asked)}
        except Exception as error:  # noqa: BLE001 (handed to the test)
            import traceback

            traceback.print_exc()
            answer = {"error": [type(error).__name__, str(error)]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
