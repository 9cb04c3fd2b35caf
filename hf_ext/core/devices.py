"""Models whose tensors lie on several devices of one process, as a `device_map` spreads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Return scalars of any devices as one tensor.

    Args:
        values: Tensors of shape (), at least one, of one dtype.

    Returns:
        (n,), on the first one's device.
    """
    return torch.stack([value.to(values[0].device) for value in values])
