"""D2O written out from the paper's equations: one completion at a time, whole logits, fp64 sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def log_probability(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Return log pi(y | x), summed over the tokens of y."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    total = 0.0
    for place, token in enumerate(completion):
        total += float(torch.log_softmax(logits[len(prompt) + place - 1], dim=-1)[token])
    return total


def margin(
    policy: Any,
    positive: Any,
    negative: Any,
    prompt: Sequence[int],
    rejected: Sequence[int],
    anchors: Sequence[Sequence[int]],
    *,
    beta: float,
    alpha: float,
    mean_over_tokens: bool = False,
) -> float:
    """Return z of one sample; `positive` is r+, of the bad completion, `negative` r-, of the anchors."""

    def ratio(reference: Any, completion: Sequence[int]) -> float:
        s = log_probability(policy, prompt, completion) - log_probability(reference, prompt, completion)
        return s / len(completion) if mean_over_tokens else s

    held = 0.0
    for anchor in anchors:
        held += beta / len(anchors) * ratio(negative, anchor)
    return held - alpha * ratio(positive, rejected)


def loss(z: float) -> float:
    """Return -log sigmoid(z)."""
    return math.log1p(math.exp(-z))
