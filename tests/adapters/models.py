"""Models of one layer and of every kind of layer, and what tests do with a small Llama again and again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.conftest import placed

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


class Output(NamedTuple):
    """What a model gives."""

    logits: Tensor
    loss: Tensor | None


class Mixed(nn.Module):
    """An embedding, convolutions of one, two and three dimensions and a linear layer, one after another."""

    targets = ("embed", "line", "plane", "space", "head")

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(256, 16, padding_idx=7)
            self.embed.weight.data[7] = 0.5  # as trained models have it: not 0
            self.line = nn.Conv1d(16, 12, 3, padding=1)
            self.plane = nn.Conv2d(1, 8, (3, 4), stride=(2, 1), padding="valid")
            self.space = nn.Conv3d(1, 16, (2, 3, 2), padding=(0, 1, 1), bias=False)
            self.head = nn.Linear(16, 10)
        placed(self.to(dtype))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        x = self.line(self.embed(input_ids).mT)  # (B, 12, T)
        x = self.plane(x[:, None])  # (B, 8, 5, T - 3)
        x = self.space(x[:, None]).amax((2, 3)).mT.contiguous()  # (B, T', 16)
        logits = self.head(x)
        loss = None if labels is None else (logits - 1.0).square().mean()
        return Output(logits, loss)
