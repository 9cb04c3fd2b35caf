"""Honest baselines for the embedded model: xz and a 5-gram model on the same held-out text.

`python scripts/tiny_llama_baselines.py` prints their bits per byte. Nothing here looks at the held-out text
to choose a setting: the n-gram model is interpolated modified Kneser-Ney (Chen and Goodman 1998), whose
discounts follow from the training counts alone.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import numpy as np

ORDER = 5


def xz_bits_per_byte(train: bytes, held_out: bytes) -> dict[str, float]:
    """Compress the held-out text with `xz -9e`, alone and as a continuation of the training text.

    Returns:
        Bits per byte of the held-out text: `xz_9e` alone; `xz_9e_after_training_text` is the growth of the
        compressed training text when the held-out text is appended (both fit in the 64 MiB window).
    """
    bits = 8 / len(held_out)
    alone, prefix, both = (_xz_size(text) for text in (held_out, train, train + held_out))
    return {"xz_9e": alone * bits, "xz_9e_after_training_text": (both - prefix) * bits}


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


class KneserNey:
    """Interpolated modified Kneser-Ney n-gram model over integer symbols.

    p_k(w | h) = max(c(hw) - D(c(hw)), 0) / c(h .) + gamma(h) p_{k-1}(w | h'), h' being h without its
    first symbol, down to the uniform p_0 = 1 / vocab_size. c is the count for the highest order and the
    number of distinct left neighbours for the lower ones; a context never seen leaves all to the lower order.

    Args:
        vocab_size: Number of symbols that can follow; symbols are 0 ... vocab_size - 1.
        start: Symbol that pads the beginning of a sequence; it may lie outside the vocabulary.
        order: Length of the n-grams, at least 1.

    Raises:
        ValueError: An n-gram does not fit into 63 bits.
    """

    def __init__(self, *, vocab_size: int, start: int, order: int = ORDER) -> None:
        self.vocab_size, self.start, self.order = vocab_size, start, order
        self.bits = max(vocab_size - 1, start).bit_length()
        if order < 1 or self.bits * order > 63:
            raise ValueError(
                f"order must be at least 1 and fit into 63 bits, {self.bits} for each symbol, got {order}"
            )

    def fit(self, sequences: Sequence[np.ndarray]) -> KneserNey:
        """Count the n-grams of the training sequences, one-dimensional arrays of symbols."""
        grams, counts = np.unique(
            np.concatenate([self._keys(sequence) for sequence in sequences]), return_counts=True
        )
        self._levels: list[_Level] = []
        for order in range(self.order, 0, -1):
            self._levels.insert(0, _Level(grams, counts, self.bits))
            # Dropping the first symbol of the distinct n-grams counts left neighbours.
            grams, counts = np.unique(grams & ((1 << self.bits * (order - 1)) - 1), return_counts=True)
        return self

    def probabilities(self, sequence: np.ndarray) -> np.ndarray:
        """Return the probability of every symbol of a sequence given those before it, shape (len,)."""
        return self._lookup(self._keys(sequence))

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """Return the distribution after a context, shape (vocab_size,); its sum is one."""
        padded = [self.start] * (self.order - 1) + list(context)
        key = 0
        for symbol in padded[len(padded) - self.order + 1 :]:
            key = key << self.bits | int(symbol)
        return self._lookup((key << self.bits) + np.arange(self.vocab_size, dtype=np.int64))

    def bits_of(self, sequences: Sequence[np.ndarray]) -> float:
        """Return the code length of the sequences, bits."""
        return float(-sum(np.log2(self.probabilities(sequence)).sum() for sequence in sequences))

    def _keys(self, sequence: np.ndarray) -> np.ndarray:
        """Pack the n-gram that ends at each position into one integer, newest symbol lowest."""
        padded = np.concatenate([np.full(self.order - 1, self.start), sequence]).astype(np.int64)
        keys = np.zeros(len(sequence), dtype=np.int64)
        for place in range(self.order):
            keys = keys << self.bits | padded[place : place + len(sequence)]
        return keys

    def _lookup(self, keys: np.ndarray) -> np.ndarray:
        p = np.full(len(keys), 1.0 / self.vocab_size)
        for order, level in enumerate(self._levels, 1):
            p = level.interpolate(keys & ((1 << self.bits * order) - 1), p)
        return p


class _Level:
    """The discounted counts of one order."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, bits: int) -> None:
        self.bits, self.grams = bits, grams
        discount = _discounts(counts)[np.minimum(counts, 3)]
        self.kept = counts - discount
        # The n-grams are sorted, so those of one context stand together.
        self.contexts, first = np.unique(grams >> bits, return_index=True)
        self.totals = np.add.reduceat(counts, first).astype(np.float64)
        self.gamma = np.add.reduceat(discount, first) / self.totals

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        at, known = _find(self.contexts, grams >> self.bits)
        gram_at, seen = _find(self.grams, grams)
        kept = np.where(seen, self.kept[gram_at], 0.0)
        return np.where(known, kept / self.totals[at] + self.gamma[at] * lower, lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each key in a sorted table (any place if absent) and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts for counts 0, 1, 2 and 3 or more (Chen and Goodman 1998, eq. 26)."""
    n = [0, *(int((counts == k).sum()) for k in range(1, 5))]
    if not all(n[1:]):  # too little text for the estimate; one half keeps the model proper
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    raw = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    return np.clip(raw, [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0])


def ngram_bits_per_byte(
    train: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    *,
    held_out_bytes: int,
    vocab_size: int,
    start: int,
) -> float:
    """Return the bits per byte that a 5-gram model of the training sequences needs for the held-out ones."""
    model = KneserNey(vocab_size=vocab_size, start=start).fit(train)
    return model.bits_of(held_out) / held_out_bytes


def byte_sequences(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the UTF-8 bytes of the texts as arrays."""
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def all_baselines(
    train: Sequence[str],
    held_out: Sequence[str],
    train_tokens: Sequence[np.ndarray],
    held_out_tokens: Sequence[np.ndarray],
    *,
    vocab_size: int,
    start: int,
) -> dict[str, float]:
    """Return the bits per byte of the held-out texts under every baseline.

    Args:
        train: Training texts.
        held_out: Held-out texts.
        train_tokens: The model's tokens of the training texts, without special tokens.
        held_out_tokens: The model's tokens of the held-out texts, without special tokens.
        vocab_size: Size of the model's vocabulary.
        start: Token that stands for the beginning of a file.
    """
    size = sum(len(text.encode()) for text in held_out)
    result = xz_bits_per_byte("".join(train).encode(), "".join(held_out).encode())
    result["5gram_bytes"] = ngram_bits_per_byte(
        byte_sequences(train), byte_sequences(held_out), held_out_bytes=size, vocab_size=256, start=256
    )
    result["5gram_tokens"] = ngram_bits_per_byte(
        train_tokens, held_out_tokens, held_out_bytes=size, vocab_size=vocab_size, start=start
    )
    if not all(math.isfinite(value) for value in result.values()):
        raise ValueError(f"a baseline is not finite: {result}")
    return result


def main() -> None:
    """Print the baselines for the embedded tokenizer."""
    from pathlib import Path

    from transformers import AutoTokenizer

    from hf_ext.data import corpus_text

    assets = Path(__file__).resolve().parents[1] / "hf_ext" / "assets" / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(assets)
    train, held_out = ([file.text for file in corpus_text(split)] for split in ("train", "test"))
    tokens = [
        [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        for texts in (train, held_out)
    ]
    result = all_baselines(train, held_out, *tokens, vocab_size=len(tokenizer), start=tokenizer.bos_token_id)
    for name, value in result.items():
        print(f"{name:28s} {value:.4f} bits per byte")


if __name__ == "__main__":
    main()
