"""What the effect scripts of merges share: fine-tunes of the embedded model on three kinds of text.

They are made once, in build/merge_lab, and found there by their settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _lab import (
    Corpus,
    blocks,
    embedded_model,
    fit,
    functions,
    loss_of,
    prose,
    tokenizer,
    with_weights,
)
from transformers import AutoModelForCausalLM

from hf_ext.core.files import atomic_folder

ROOT = Path(__file__).resolve().parents[1] / "build" / "merge_lab"
STEPS, RATE = 100, 3e-4
# Character tables of `encodings`, which were written by a program: the embedded model has read none.
_TABLES = ("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1257", "cp437", "cp850", "cp852", "cp866",
           "iso8859_2", "iso8859_5", "iso8859_7", "koi8_r", "mac_roman", "mac_greek")  # fmt: skip
_HELD_OUT = {"validation": ("cp1255", "iso8859_9"), "test": ("cp1258", "iso8859_15", "koi8_u")}


@cache
def tables() -> Corpus:
    """Return the sources of character tables, in blocks of tokens."""
    parts = {"train": _TABLES, **_HELD_OUT}
    return Corpus(**{split: _first(blocks(map(_source, names))) for split, names in parts.items()})


def _source(name: str) -> str:
    path = importlib.import_module(f"encodings.{name}").__file__
    assert path is not None
    return Path(path).read_text(encoding="utf-8")


def _first(rows: Any, count: int = 2000) -> Any:
    return rows.select(range(min(count, len(rows))))


def corpora() -> dict[str, Corpus]:
    """Return the three kinds of text by name."""
    return {"functions": functions(), "prose": prose(), "tables": tables()}


def expert(name: str, seed: int = 0, steps: int = STEPS, rate: float = RATE) -> Path:
    """Return the folder of the embedded model, all weights fine-tuned on one kind of text.

    Args:
        name: "functions", "prose" or "tables".
        seed: Order of the data.
        steps: Optimizer steps of 8 x 128 tokens, AdamW, linear decay.
        rate: Learning rate at the start.
    """
    folder = ROOT / (f"{name}-seed{seed}-steps{steps}" + (f"-rate{rate:g}" if rate != RATE else ""))
    if not folder.is_dir():
        model, corpus = embedded_model(), corpora()[name]
        fit(
            corpus.train,
            corpus.validation,
            learning_rate=rate,
            seed=seed,
            max_steps=steps,
            model=model,
            evaluate=False,
        )
        write(model, folder)
    return folder


def experts(seed: int = 0) -> dict[str, Path]:
    """Return the three fine-tunes by name."""
    return {name: expert(name, seed) for name in corpora()}


def write(model: Any, folder: Path) -> None:
    """Write a model and its tokenizer, complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer().save_pretrained(fresh)


def losses(model: Any, split: str = "test") -> dict[str, float]:
    """Return a model's held-out loss on each kind of text and their mean, nats per token.

    Args:
        model: The model, or its folder.
        split: "validation" or "test".
    """
    if isinstance(model, (str, Path)):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {name: loss_of(model, getattr(corpus, split)) for name, corpus in corpora().items()}
    return {**found, "mean": sum(found.values()) / len(found)}


def losses_of_state(state: Mapping[str, torch.Tensor], split: str = "test") -> dict[str, float]:
    """Return the losses of the embedded architecture with other weights."""
    return losses(with_weights(state), split)
