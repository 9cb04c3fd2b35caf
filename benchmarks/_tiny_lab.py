"""The tiny laboratory of the trainers' effect scripts: a character model that trains in seconds on one core.

49 symbols (pad, bos, eos, digits, letters, `+=#!?.,:;` and the space), two layers of width 64, 88,512
parameters, fp32. Nothing here puts a bos before a text, and neither do TRL's trainers with this tokenizer.
Importing this module turns off TRL's telemetry.
"""

from __future__ import annotations

import os
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# huggingface_hub read the variable at its first import, perhaps before this; the variable is for children.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
constants.HF_HUB_DISABLE_TELEMETRY = True

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SYMBOLS = (PAD, BOS, EOS, *string.digits, *string.ascii_lowercase, *"+=#!?.,:; ")
_ROWS = 512  # of one forward pass without gradients
_IGNORED = -100


def char_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character and no chat template; other characters are refused."""
    # WordLevel and not BPE, which would drop an unknown character without a word.
    tokenizer = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    seed: int = 0,
    hidden_size: int = 64,
    *,
    intermediate_size: int | None = None,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    max_position_embeddings: int = 64,
) -> LlamaForCausalLM:
    """Return a random Llama over the symbols, fp32; global random state is left as it was.

    Args:
        seed: Of the weights.
        hidden_size: Width, a multiple of the heads.
        intermediate_size: Width inside the MLP; None for twice `hidden_size`.
        num_hidden_layers: Layers.
        num_attention_heads: Heads, with as many keys and values.
        max_position_embeddings: Longest text, tokens.
    """
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size if intermediate_size is None else intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        pad_token_id=SYMBOLS.index(PAD),
        bos_token_id=SYMBOLS.index(BOS),
        eos_token_id=SYMBOLS.index(EOS),
        dtype=torch.float32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def saved(model: Any, tokenizer: Any, folder: Path | str) -> str:
    """Write model and tokenizer, and return the folder.

    TRL makes the reference of full fine-tuning by loading the path in the model's config, so a trainer is
    given this folder, or the model that `from_pretrained` loads from it, and not the model in memory.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pretrain(
    model: Any,
    texts: Sequence[tuple[str, str]],
    steps: int,
    *,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
    tokenizer: Any = None,
) -> list[float]:
    """Train a model in place on prompts and completions, with AdamW at a constant rate.

    The loss is the mean over the tokens of the completions and their EOS. Every pass over the texts is
    shuffled anew.

    Args:
        model: Causal language model.
        texts: Pairs of prompt and completion, at least `batch` of them.
        steps: Optimizer steps.
        lr: Learning rate.
        batch: Pairs in a batch.
        seed: Of the order of the texts.
        tokenizer: Of the model; None for `char_tokenizer()`.

    Returns:
        The loss of every step, nats per token.
    """
    tokenizer = char_tokenizer() if tokenizer is None else tokenizer
    if not 1 <= batch <= len(texts):
        raise ValueError(f"batch must be from 1 to {len(texts)}, the number of texts, got {batch}")
    ids, labels = _encoded(tokenizer, [text for text, _ in texts], [text for _, text in texts])
    rng, order = random.Random(seed), []
    # No decay: a few hundred steps, and the scripts compare likelihoods.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    was, losses = model.training, []
    model.train()
    for _ in range(steps):
        if len(order) < batch:
            order = rng.sample(range(len(texts)), len(texts))
        rows, order = order[:batch], order[batch:]
        loss = _token_losses(model, ids[rows], labels[rows]).sum() / (labels[rows, 1:] != _IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.train(was)
    return losses


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """Return n sampled completions of each prompt, without EOS; global random state is left as it was.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to complete.
        n: Completions of each.
        max_new_tokens: Longest completion, tokens.
        temperature: Of the sampling; 0 takes the most likely token, so that the n completions are equal.
        seed: Of the sampling.
    """
    _check_prompts(prompts)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    was, found = model.training, []
    model.eval()
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # Written out, so that no setting that a trainer left in the generation config takes part.
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in _parts(prompts, max(1, _ROWS // n)):
            inputs = tokenizer(list(rows), return_tensors="pt", padding=True, padding_side="left")
            device = model.device
            output = model.generate(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=inputs["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                num_return_sequences=n if temperature > 0 else 1,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **how,
            )
            texts = tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            if temperature > 0:
                found += [texts[start : start + n] for start in range(0, len(texts), n)]
            else:
                found += [[text] * n for text in texts]
    model.train(was)
    return found


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Return the log-probability of each completion and its EOS after its prompt, nats, shape (N,).

    It is the sum over tokens at temperature 1.
    """
    was, found = model.training, []
    model.eval()
    for rows in _parts(list(zip(prompts, completions, strict=True)), _ROWS):
        ids, labels = _encoded(tokenizer, [prompt for prompt, _ in rows], [text for _, text in rows])
        found.append(-_token_losses(model, ids, labels).sum(1).cpu())
    model.train(was)
    return torch.cat(found) if found else torch.zeros(0)


def trainer_arguments(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Return the arguments that every run of a TRL trainer here has, on the CPU in fp32 and silent.

    Args:
        folder: Output folder.
        **changes: Further arguments, and others for these.
    """
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,  # the name since transformers 5.23 of gradient_checkpointing
        "report_to": [],
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "dataloader_pin_memory": False,
        **changes,
    }


def expected_calibration_error(
    confidence: Sequence[float] | Tensor, correct: Sequence[bool] | Sequence[float] | Tensor, bins: int = 10
) -> float:
    """Return the mean gap between confidence and accuracy over bins of equal width, weighted by their rows.

    Args:
        confidence: Probabilities in [0, 1], shape (N,), N >= 1.
        correct: Whether each was right, shape (N,).
        bins: Number of bins; a bin holds its upper edge, the first one 0 as well.
    """
    given = torch.as_tensor(confidence, dtype=torch.double)
    right = torch.as_tensor(correct, dtype=torch.double)
    if given.ndim != 1 or not len(given) or given.shape != right.shape:
        raise ValueError(f"confidence and correct must be (N,), got {[*given.shape]} and {[*right.shape]}")
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(f"confidence must be in [0, 1], got {float(given.min())} to {float(given.max())}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = torch.arange(1, bins, dtype=torch.double) / bins
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, torch.bucketize(given, edges), given - right)
    return float(gaps.abs().sum() / len(given))


def _check_prompts(prompts: Sequence[str]) -> None:
    # The first token of a text has no prediction, so it would be left out of a likelihood in silence.
    if "" in prompts:
        raise ValueError(
            f"prompts must not be empty; row {list(prompts).index('')} is: put {BOS} or '#' there"
        )


def _encoded(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and labels (N, L) of prompt, completion and EOS, padded at the right."""
    _check_prompts(prompts)
    # Apart from each other, so that the border is one of tokens whatever the tokenizer.
    starts = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    rests = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    rows = []
    for start, rest in zip(starts, rests, strict=True):
        ended = [*rest, tokenizer.eos_token_id]
        rows.append((start + ended, [_IGNORED] * len(start) + ended))
    length = max(len(ids) for ids, _ in rows)
    ids = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows]
    labels = [labels + [_IGNORED] * (length - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def _token_losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every token after the first, zero where the label is ignored, (N, L - 1)."""
    # Padding is at the right, where a causal model does not look: no mask is needed.
    logits = model(input_ids=ids.to(model.device)).logits[:, :-1]  # (N, L - 1, V)
    wanted = labels[:, 1:].to(logits.device)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=_IGNORED
    )
    return losses.view_as(wanted)


def _parts(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
