"""Tests on the second device: `HF_EXT_TEST_DEVICE=side pytest ...`.

Accelerate and the Trainer are told that the device is there and is theirs, whatever `use_cpu` says, as they
find a GPU by themselves, and so are the factories of small models. What a test builds by itself stays on the
CPU. Memory is not pinned.
"""

from __future__ import annotations

from typing import Any

import torch.utils.data._utils.pin_memory as pinning
from accelerate.state import PartialState
from transformers import TrainingArguments

from .device import DEVICE

_init = PartialState.__init__


def _on_the_device(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self.device = DEVICE


PartialState.__init__ = _on_the_device
TrainingArguments.device = property(lambda self: (self._setup_devices, DEVICE)[1])  # pyright: ignore[reportAttributeAccessIssue]
pinning.pin_memory = lambda data, device=None: data
