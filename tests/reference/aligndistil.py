"""AlignDistil's loss token by token, in plain double precision; and by TRL's kernel over both teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return probabilities of one position."""
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [x / sum(powers) for x in powers]


def token(
    dpo: Sequence[float],
    reverse: Sequence[float],
    student: Sequence[float],
    *,
    beta: float = 0.1,
    eta: float = 10.0,
    floor: float = 1e-3,
    temperature: float = 1.0,
    scale: bool = True,
) -> dict[str, object]:
    """Return D, w, z*, the KL and the loss of one token."""
    apart = sum(abs(p - q) for p, q in zip(softmax(dpo), softmax(reverse), strict=True))
    w = eta * apart + floor
    logits = [d + w * (d - r) for d, r in zip(dpo, reverse, strict=True)]
    own, other = softmax(student, temperature), softmax(logits, temperature)
    kl = sum(p * (math.log(p) - math.log(q)) for p, q in zip(own, other, strict=True))
    return {"D": apart, "w": w, "z": logits, "kl": kl, "loss": (beta / w if scale else 1.0) * kl}


def sequences(dpo: Tensor, reverse: Tensor, student: Tensor, mask: Tensor, **settings: Any) -> float:
    """Return the mean over completions of the means over their tokens: logits (B, T, V), mask (B, T)."""
    means = []
    for row in range(len(mask)):
        losses = [
            token(dpo[row, t].tolist(), reverse[row, t].tolist(), student[row, t].tolist(), **settings)[
                "loss"
            ]
            for t in range(mask.size(1))
            if mask[row, t]
        ]
        if losses:
            means.append(sum(losses) / len(losses))  # type: ignore[arg-type]
    return sum(means) / len(means)


def side_by_side(
    student: tuple[Tensor, Tensor], dpo: tuple[Tensor, Tensor], reverse: tuple[Tensor, Tensor], w: Tensor
) -> Tensor:
    """Return KL(student || softmax(z*)), (N,), from TRL's kernel given both teachers side by side.

    Args:
        student: Hidden states (N, H) and head (V, H).
        dpo: Of the DPO model.
        reverse: Of the reverse model.
        w: (N,) strengths.
    """
    hidden = torch.cat([(1 + w)[:, None] * dpo[0], -w[:, None] * reverse[0]], dim=1)
    head = torch.cat([dpo[1], reverse[1]], dim=1)
    return ChunkedDivergenceFunction.apply(*student, None, hidden, head, None, 1.0)[0]  # type: ignore[index]
