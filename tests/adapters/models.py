"""A model of one layer, and what the tests of adapters do with a small Llama again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 256


class OneLayer(nn.Module):
    """A model of one linear layer with a given weight."""

    def __init__(self, weight: Tensor, bias: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
        self.lin.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Return a model's logits in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def steps(model: Any, count: int = 3, lr: float = 1e-2, ids: Tensor = IDS) -> None:
    """Train a model's trainable parameters with AdamW on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
