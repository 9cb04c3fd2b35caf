"""The unlearning losses token by token and row by row, in double precision, as the papers write them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Return log-probabilities of one position."""
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def row_logps(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the log-probability of each label token of one row: logits (L, V), labels (L,)."""
    found = []
    for t in range(1, len(labels)):
        if labels[t] != -100:
            found.append(log_softmax(logits[t - 1].double().tolist())[int(labels[t])])
    return found


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Return l: the mean over all label tokens of a batch (B, L, V), (B, L)."""
    found = [x for row in range(len(labels)) for x in row_logps(logits[row], labels[row])]
    return -sum(found) / len(found)


def npo(logits: Tensor, reference: Tensor, labels: Tensor, beta: float, level: str) -> float:
    """Return NPO's loss of a batch, with a d for each row or one d per token and batch."""
    rows = range(len(labels))
    own = [row_logps(logits[row], labels[row]) for row in rows]
    start = [row_logps(reference[row], labels[row]) for row in rows]
    if level == "sequence":
        ds = [sum(a) - sum(b) for a, b in zip(own, start, strict=True)]
    else:
        tokens = sum(len(row) for row in own)
        ds = [(sum(map(sum, own)) - sum(map(sum, start))) / tokens]
    sigmoids = [1.0 / (1.0 + math.exp(beta * d)) for d in ds]
    return -(2.0 / beta) * sum(math.log(s) for s in sigmoids) / len(ds)


def forward_kl(logits: Tensor, reference: Tensor, labels: Tensor) -> float:
    """Return the mean of KL(p_ref || p) over the label tokens of a batch."""
    found = []
    for row in range(len(labels)):
        for t in range(1, labels.size(1)):
            if labels[row, t] == -100:
                continue
            logp = log_softmax(logits[row, t - 1].double().tolist())
            logq = log_softmax(reference[row, t - 1].double().tolist())
            found.append(sum(math.exp(q) * (q - p) for p, q in zip(logp, logq, strict=True)))
    return sum(found) / len(found)


def loss(
    name: str,
    forget: tuple[Tensor, Tensor, Tensor],
    retain: tuple[Tensor, Tensor, Tensor] | None,
    *,
    retain_loss: str = "nll",
    gamma: float = 1.0,
    beta: float = 0.1,
    level: str = "sequence",
) -> float:
    """Return a loss; each stream is (logits, reference logits, labels)."""
    logits, reference, labels = forget
    if name == "npo":
        total = npo(logits, reference, labels, beta, level)
    else:
        total = mean_loss(logits, labels) * (1.0 if name == "po" else -1.0)
    if retain is not None and name != "ga" and retain_loss != "none":
        kept = forward_kl(*retain) if retain_loss == "kl" else mean_loss(retain[0], retain[2])
        total += gamma * kept
    return total
