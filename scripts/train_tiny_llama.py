"""Train the embedded model on the text of the standard library and write `hf_ext/assets/tiny-llama`.

    OMP_NUM_THREADS=1 python scripts/train_tiny_llama.py --minutes 75 --checkpoint-dir checkpoints

The wall clock is the budget: after the warm-up the learning rate falls linearly with the elapsed share of
`--minutes` and reaches zero at the end, whatever the speed of the machine. The order of the data depends on
the seed and the step alone, so `--resume` goes on from the last checkpoint where it stopped. The folder is
written only after evaluation and baselines, file by file and each by a rename, so a reader never sees half
a file. Every checkpoint is safetensors and JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tiny_llama_baselines import all_baselines  # noqa: E402

from hf_ext.data import corpus_text, docstring_pairs  # noqa: E402

VOCAB_SIZE = 4096
CONTEXT = 1024
STRIDE = 512
BLOCK = 128  # queries per block of attention in training
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHECK_MODULES = ("statistics", "logging.handlers", "http.client", "multiprocessing.pool")
CHECK_CHARS = slice(6000, 7000)  # behind the licence, and within one window


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made from; a resumed run must have the same.

    Args:
        seed: Of the weights and the order of the data.
        lr: Peak learning rate of AdamW.
        warmup_steps: Optimizer steps until the peak.
        weight_decay: Of every matrix; norms have none. The text is read more than ten times, and a
            stronger decay than the usual 0.1 is what keeps a small model from learning it by heart.
        batch_size: Windows per optimizer step.
        pair_ratio: Share of the windows that hold source -> docstring pairs. Small, so that fine-tuning
            on the pairs has something left to teach.
    """

    seed: int = 0
    lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    batch_size: int = 4
    pair_ratio: float = 0.07


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: Optimizer steps done.
        elapsed: Seconds of the budget used.
        curve: One row per evaluation.
    """

    step: int = 0
    elapsed: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Corpus:
    """Texts, and tokens without special tokens, of one split, file by file."""

    modules: list[str]
    texts: list[str]
    tokens: list[np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Length of all texts, bytes."""
        return sum(len(text.encode()) for text in self.texts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, without special tokens."""
        return sum(len(tokens) for tokens in self.tokens)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; decoding gives back every text exactly.

    No normaliser and no added space, and all 256 bytes are in the vocabulary: nothing is unknown.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    bos = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 3.4 M parameters, grouped-query attention, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def blocked_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention for training without padding, a block of queries at a time.

    On a CPU this is about twice as fast as torch's fused attention in bf16; the blocks leave out most of
    the masked half.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, T, D)
    mask = torch.full((BLOCK, BLOCK), -math.inf, dtype=query.dtype).triu(1)
    blocks = []
    for start in range(0, query.shape[2], BLOCK):
        stop = start + BLOCK
        scores = (query[:, :, start:stop] * scaling) @ key[:, :, :stop].transpose(-1, -2)
        blocks.append((scores + F.pad(mask, (start, 0))).softmax(-1) @ value[:, :, :stop])
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("blocked", blocked_attention)


class Batches:
    """Training windows whose order depends on the seed and the step alone."""

    def __init__(self, documents: list[np.ndarray], pairs: list[np.ndarray], settings: Settings) -> None:
        self.documents, self.pairs, self.settings = documents, pairs, settings
        length = sum(len(document) for document in documents)
        self.text_windows = length // CONTEXT - 1  # one less: a random offset moves them
        self.pair_windows = round(self.text_windows * settings.pair_ratio / (1 - settings.pair_ratio))
        self.per_epoch = self.text_windows + self.pair_windows
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __call__(self, step: int) -> Tensor:
        """Return the tokens of an optimizer step, shape (batch_size, CONTEXT + 1)."""
        size = self.settings.batch_size
        rows = []
        for row in range(step * size, (step + 1) * size):
            epoch, place = divmod(row, self.per_epoch)
            rows.append(self._epoch(epoch)[place])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _make_epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.settings.seed, epoch])
        text = _windows(self.documents, self.text_windows, rng)
        pairs = _windows(self.pairs, self.pair_windows, rng)
        both = np.concatenate([text, pairs])
        return both[rng.permutation(len(both))]


def _windows(documents: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Cut documents, in random order and from a random offset, into windows (count, CONTEXT + 1)."""
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    while len(stream) < (count + 1) * CONTEXT + 1:  # the pairs are fewer than their share in small corpora
        stream = np.concatenate([stream, stream])
    offset = int(rng.integers(CONTEXT))
    starts = range(offset, offset + count * CONTEXT, CONTEXT)
    return np.stack([stream[at : at + CONTEXT + 1] for at in starts])


def read_corpus(split: str, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Return the texts and tokens of a split."""
    files = list(corpus_text(split))
    texts = [file.text for file in files]
    return Corpus([file.module for file in files], texts, _encode(tokenizer, texts))


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    core = tokenizer.backend_tokenizer
    return [np.array(core.encode(text, add_special_tokens=False).ids, dtype=np.int64) for text in texts]


def learning_rate(settings: Settings, step: int, share: float) -> float:
    """Return the learning rate: linear warm-up over steps, linear fall to zero over the budget."""
    return settings.lr * min(1.0, (step + 1) / settings.warmup_steps) * max(0.0, 1.0 - share)


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def make_loss(model: LlamaForCausalLM, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """Return the mean loss of a batch of windows, nats per token, in bf16 autocast."""

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return torch.compile(loss) if compiled else loss


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    validation: Tensor,
    progress: Progress,
    args: argparse.Namespace,
    settings: Settings,
) -> None:
    """Train until the budget is used up, with a checkpoint after every evaluation."""
    optimizer = make_optimizer(model, settings)
    if progress.step:
        load_optimizer(optimizer, model, latest_checkpoint(args.checkpoint_dir))
    model.set_attn_implementation("blocked")
    loss_of = make_loss(model, compiled=not args.no_compile)
    budget, used_before, start = args.minutes * 60, progress.elapsed, time.monotonic()
    next_evaluation = progress.elapsed + args.eval_seconds
    losses: list[float] = []
    while progress.elapsed < budget:
        lr = learning_rate(settings, progress.step, progress.elapsed / budget)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(batches(progress.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.step += 1
        progress.elapsed = used_before + time.monotonic() - start
        if progress.elapsed >= min(next_evaluation, budget):
            row = {
                "step": progress.step,
                "tokens": progress.step * settings.batch_size * CONTEXT,
                "minutes": round(progress.elapsed / 60, 3),
                "lr": lr,
                "train_nats_per_token": float(np.mean(losses)),
                "validation_nats_per_token": window_loss(loss_of, validation, settings.batch_size),
            }
            progress.curve.append(row)
            print(json.dumps(row), flush=True)
            losses = []
            progress.elapsed = used_before + time.monotonic() - start
            next_evaluation = progress.elapsed + args.eval_seconds
            save_checkpoint(model, optimizer, progress, settings, args.checkpoint_dir)


@torch.no_grad()
def window_loss(loss_of: Callable[[Tensor], Tensor], windows: Tensor, batch_size: int) -> float:
    """Return the mean loss of windows, nats per token."""
    return float(np.mean([loss_of(batch).item() for batch in windows.split(batch_size)]))


@torch.no_grad()
def text_nats(model: LlamaForCausalLM, documents: list[np.ndarray], bos: int, pad: int) -> float:
    """Return the total code length of documents, nats, each document begun with the bos token.

    Windows of `CONTEXT` tokens every `STRIDE` tokens; each token is counted once, in the window where it
    has the longest context, so all but the first of a document have at least `CONTEXT - STRIDE` before them.
    """
    rows, first = [], []
    for document in documents:
        tokens = np.concatenate([[bos], document])
        scored = 0  # targets counted so far
        for start in range(0, max(len(document) - CONTEXT, 0) + STRIDE, STRIDE):
            window = tokens[start : start + CONTEXT + 1]
            if start + len(window) - 1 <= scored:
                break
            rows.append(np.pad(window, (0, CONTEXT + 1 - len(window)), constant_values=-1))
            first.append(scored - start)
            scored = start + len(window) - 1
        if scored != len(document):
            raise RuntimeError(f"{scored} of {len(document)} tokens were counted")
    total = 0.0
    for at in range(0, len(rows), 8):
        batch = torch.from_numpy(np.stack(rows[at : at + 8]))
        logits = model(input_ids=batch[:, :-1].masked_fill(batch[:, :-1] < 0, pad), use_cache=False).logits
        targets = batch[:, 1:].clone()
        for row, skip in enumerate(first[at : at + 8]):
            targets[row, :skip] = -1
        total += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        ).item()
    return total


def save_checkpoint(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Settings,
    folder: Path,
) -> None:
    """Write a checkpoint beside the last one, rename it into place, then delete the last one."""
    final = folder / f"step-{progress.step:07d}"
    staging = folder / f"{final.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    named = dict(model.named_parameters())
    save_file({name: p.detach() for name, p in named.items()}, staging / "model.safetensors")
    moments = {
        f"{name}/{key}": value
        for name, p in named.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    save_file(moments, staging / "optimizer.safetensors")
    state = {"settings": asdict(settings), "progress": asdict(progress)}
    (staging / "state.json").write_text(json.dumps(state, indent=1))
    os.replace(staging, final)
    for old in checkpoints(folder):
        if old != final:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(".tmp"))


def latest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a folder that has one."""
    return checkpoints(folder)[-1]


def load_optimizer(optimizer: torch.optim.Optimizer, model: LlamaForCausalLM, checkpoint: Path) -> None:
    """Put the moments of a checkpoint into a fresh optimizer."""
    named = dict(model.named_parameters())
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, state_key = key.rpartition("/")
        optimizer.state[named[name]][state_key] = value


def load_progress(model: LlamaForCausalLM, settings: Settings, checkpoint: Path) -> Progress:
    """Load weights and progress of a checkpoint.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    wanted = json.loads(json.dumps(asdict(settings)))
    if state["settings"] != wanted:
        raise ValueError(f"{checkpoint} was made with settings {state['settings']}, got {wanted}")
    missing = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    # Tied to the embedding, hence not stored.
    if set(missing.missing_keys) - {"lm_head.weight"} or missing.unexpected_keys:
        raise ValueError(f"{checkpoint} does not fit the model: {missing}")
    return Progress(**state["progress"])


def check_slices(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Return short held-out texts with their loss, from which a test recognises the weights."""
    texts = {file.module: file.text for file in corpus_text("test")}
    rows = []
    for module in CHECK_MODULES:
        text = texts[module][CHECK_CHARS]
        tokens = _encode(tokenizer, [text])
        nats = text_nats(model, tokens, tokenizer.bos_token_id, tokenizer.pad_token_id)
        rows.append({"module": module, "text": text, "tokens": len(tokens[0]), "nats": nats})
    return rows


def finish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpora: dict[str, Corpus],
    report: dict[str, Any],
    out: Path,
) -> None:
    """Save in bf16, evaluate what was saved, add the baselines, then move everything into `out`."""
    staging = out.parent / f".{out.name}.new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # transformers 5 writes the new name of its class; the old one loads in 4 and 5.
    settings_file = staging / "tokenizer_config.json"
    tokenizer_settings = json.loads(settings_file.read_text())
    tokenizer_settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(tokenizer_settings, indent=2) + "\n")
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=160,
    ).save_pretrained(staging)
    saved = AutoModelForCausalLM.from_pretrained(staging, dtype=torch.float32).eval()
    test, bos = corpora["test"], tokenizer.bos_token_id
    print("evaluating on the held-out text", flush=True)
    nats = text_nats(saved, test.tokens, bos, tokenizer.pad_token_id)
    print("computing the baselines", flush=True)
    baselines = all_baselines(
        corpora["train"].texts,
        test.texts,
        corpora["train"].tokens,
        test.tokens,
        vocab_size=VOCAB_SIZE,
        start=bos,
    )
    report["bits_per_byte"] = {"model": nats / test.num_bytes / math.log(2), **baselines}
    report["held_out_nats"] = nats
    report["check"] = check_slices(saved, tokenizer)
    report["weights_sha256"] = hashlib.sha256((staging / "model.safetensors").read_bytes()).hexdigest()
    draw_curve(report, corpora, staging / "loss_curve.png")
    (staging / "README.md").write_text(model_card(report))
    (staging / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    # The weights and their report last: everything before them is the same in every run.
    late = ("README.md", "loss_curve.png", "model.safetensors", "training.json")
    (staging / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone
    for path in sorted(staging.iterdir(), key=lambda p: late.index(p.name) if p.name in late else -1):
        os.replace(path, out / path.name)
    staging.rmdir()
    print(json.dumps(report["bits_per_byte"], indent=1), flush=True)


def draw_curve(report: dict[str, Any], corpora: dict[str, Corpus], path: Path) -> None:
    """Draw the loss in bits per byte over the tokens seen, with the baselines as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=90)
    millions = [row["tokens"] / 1e6 for row in report["curve"]]
    for split in ("train", "validation"):
        corpus = corpora[split]
        scale = corpus.num_tokens / corpus.num_bytes / math.log(2)
        bits = [row[f"{split}_nats_per_token"] * scale for row in report["curve"]]
        axes.plot(millions, bits, marker=".", label=split)
    values = report["bits_per_byte"]
    for color, name in zip(("C3", "C4", "C5"), ("5gram_tokens", "5gram_bytes", "xz_9e"), strict=True):
        axes.axhline(values[name], color=color, ls="--", lw=1, label=f"{name.replace('_', ' ')}, held-out")
    axes.axhline(values["model"], color="C2", lw=1, label="model, held-out")
    axes.set(xlabel="training tokens (millions)", ylabel="bits per byte", title="tiny-llama")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def model_card(report: dict[str, Any]) -> str:
    """Return the text of the model card."""
    bits, sizes = report["bits_per_byte"], report["corpus"]
    names = {
        "model": "**this model**",
        "5gram_tokens": "5-gram over the model's tokens, interpolated modified Kneser-Ney",
        "5gram_bytes": "5-gram over bytes, interpolated modified Kneser-Ney",
        "xz_9e_after_training_text": "`xz -9e`, with the training text as prefix",
        "xz_9e": "`xz -9e`, held-out text alone",
    }
    table = "\n".join(f"| {label} | {bits[name]:.3f} |" for name, label in names.items())
    tokens = report["tokens_seen"]
    return f"""---
license: other
license_name: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, tiny]
---

# tiny-llama

A Llama-architecture causal language model of {report["parameters"] / 1e6:.2f} M parameters, trained on the
source text of Python's own standard library. It is the default model of hf_ext: small enough to ship and to
run in a test, and really trained, so that its spectra, activations and losses are those of a network and
not of noise. It writes text that looks like Python; it is of no other use.

- Tokenizer: byte-level BPE, {VOCAB_SIZE} tokens, exact on every text; a bos token is put before each text.
- Context: {CONTEXT} tokens. Weights: bf16 safetensors, embeddings tied.
- Training text: {sizes["train"]["bytes"] / 1e6:.1f} MB ({sizes["train"]["tokens"] / 1e6:.2f} M tokens)
  of Python {report["python"]}; {tokens / 1e6:.0f} M tokens seen ({report["epochs"]:.1f} passes) in
  {report["minutes"]:.0f} minutes on one CPU thread.
  {report["settings"]["pair_ratio"]:.0%} of the windows hold functions followed by their docstrings, the
  form of `hf_ext.data.docstring_pairs`, so the model knows that task a little.
- `validation` and `test` modules (`hf_ext.data.split_of`) are not in the training text, nor are functions
  that stand in them verbatim.

## Held-out loss

Bits per byte over the {sizes["test"]["bytes"] / 1e3:.0f} kB of the `test` modules
({", ".join(report["held_out_modules"])}).
The model's number is exact: total nats of all tokens / total bytes / ln 2, in windows of {CONTEXT} tokens
every {STRIDE}, each token counted once and each file begun with the bos token. Nothing was tuned on this
text.

| | bits per byte |
|---|---|
{table}

![loss curve](loss_curve.png)

`training.json` holds the curve's numbers, all settings and versions.

## Make it again

    OMP_NUM_THREADS=1 python scripts/train_tiny_llama.py \\
        --minutes {report["budget_minutes"]:.0f} --checkpoint-dir CHECKPOINTS

The schedule follows the wall clock, so another run gives other weights of about the same loss.

## Licence

The training text is the Python standard library, copyright Python Software Foundation and contributors, under
the PSF License Agreement (some files carry further notices of their authors). The short excerpts in
`training.json` are from there.
"""


def make_report(
    model: LlamaForCausalLM,
    corpora: dict[str, Corpus],
    batches: Batches,
    progress: Progress,
    args: argparse.Namespace,
    settings: Settings,
) -> dict[str, Any]:
    """Return the content of training.json but for what the evaluation adds."""
    tokens = progress.step * settings.batch_size * CONTEXT
    return {
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(settings),
        "context": CONTEXT,
        "budget_minutes": args.minutes,
        "minutes": round(progress.elapsed / 60, 3),
        "threads": args.threads,
        "compiled": not args.no_compile,
        "steps": progress.step,
        "tokens_seen": tokens,
        "epochs": progress.step * settings.batch_size / batches.per_epoch,
        "tokens_per_second": round(tokens / progress.elapsed),
        "corpus": {
            split: {"files": len(c.texts), "bytes": c.num_bytes, "tokens": c.num_tokens}
            for split, c in corpora.items()
        },
        "pairs": {"documents": len(batches.pairs), "tokens": sum(len(pair) for pair in batches.pairs)},
        "held_out_modules": _top_levels(corpora["test"]),
        "validation_modules": _top_levels(corpora["validation"]),
        "evaluation": f"strided windows: {CONTEXT} tokens every {STRIDE}, fp32, weights rounded to bf16",
        "curve": progress.curve,
    }


def _top_levels(corpus: Corpus) -> list[str]:
    return sorted({module.split(".")[0] for module in corpus.modules})


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="budget of wall-clock time for training")
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "hf_ext" / "assets" / "tiny-llama")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-seconds", type=float, default=150.0, help="time between evaluations")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, half as fast")
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--weight-decay", type=float, default=Settings.weight_decay)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    if checkpoints(args.checkpoint_dir) and not args.resume:
        parser.error(f"--checkpoint-dir {args.checkpoint_dir} holds a run: pass --resume or another folder")
    return args


def main() -> None:
    """Train, evaluate and write the assets."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(
        seed=args.seed, lr=args.lr, weight_decay=args.weight_decay, batch_size=args.batch_size
    )
    tokenizer = build_tokenizer([file.text for file in corpus_text("train")])
    corpora = {split: read_corpus(split, tokenizer) for split in ("train", "validation", "test")}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [np.concatenate([[bos], tokens, [eos]]) for tokens in corpora["train"].tokens]
    pair_texts = [pair.prompt + pair.completion for pair in docstring_pairs("train")]
    pairs = [np.concatenate([[bos], tokens, [eos]]) for tokens in _encode(tokenizer, pair_texts)]
    batches = Batches(documents, pairs, settings)
    # Windows only: the curve needs a steady number, the exact one comes at the end.
    stream = np.concatenate([np.concatenate([[bos], t, [eos]]) for t in corpora["validation"].tokens])
    validation = torch.from_numpy(_windows([stream], 64, np.random.default_rng(settings.seed)))
    model = build_model(tokenizer, settings.seed)
    progress = Progress()
    if args.resume and checkpoints(args.checkpoint_dir):
        progress = load_progress(model, settings, latest_checkpoint(args.checkpoint_dir))
    for split, corpus in corpora.items():
        print(f"{split}: {len(corpus.texts)} files, {corpus.num_bytes} bytes, {corpus.num_tokens} tokens")
    print(f"{len(pairs)} pairs; {model.num_parameters()} parameters; step {progress.step}", flush=True)
    train(model, batches, validation, progress, args, settings)
    finish(
        model, tokenizer, corpora, make_report(model, corpora, batches, progress, args, settings), args.out
    )


if __name__ == "__main__":
    main()
