"""Batches whose rows use different adapters: `model(..., adapter_names=[...])`, one name for each row.

As PEFT's LoRA has it, for inference: each row comes out as with its adapter alone, "__base__" as without any.
Here the names reach every adapted layer, and every module that is trained whole, by forward hooks that are
gone after the call, also where it fails; PEFT leaves them behind then. Generation that repeats rows (beams,
several sequences for one prompt) repeats the names wherever a layer sees the repeated rows, and so not in an
encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._compat.peft import AuxiliaryTrainingWrapper, adapters_of_wrapper
from ..core.checks import check, refuse_unknown

__all__ = ["BASE", "RowNames", "check_names", "mixed_batch", "repeats_of"]

BASE = "__base__"  # the name that PEFT gives to rows without an adapter


class RowNames(list[str]):
    """The adapter of each row that a layer sees; a list, which is what PEFT's own layers take."""

    def groups(self, count: int, device: torch.device, module: str) -> dict[str, Tensor]:
        """Return the indices of each name's rows, (n,) int64, in the names' order of appearance.

        Args:
            count: Number of rows of the layer's input.
            device: Where the indices are to be.
            module: The layer, for the error.

        Raises:
            ValueError: There are not as many names as rows.
        """
        rule = f"one name for each of the {count} rows that the layer sees"
        if count % max(1, len(self)) == 0:
            rule += " (where generation repeats rows, pass num_beams or num_return_sequences to generate)"
        check(len(self) == count, "adapter_names", list(self), rule, where=module)
        known: dict[torch.device, dict[str, Tensor]] = self.__dict__.setdefault("_groups", {})
        if device not in known:
            rows: dict[str, list[int]] = {}
            for row, name in enumerate(self):
                rows.setdefault(name, []).append(row)
            known[device] = {name: torch.tensor(found, device=device) for name, found in rows.items()}
        return known[device]


def check_names(names: object, known: Sequence[str]) -> list[str]:
    """Return the names given for a batch's rows, checked.

    Args:
        names: What the user gave.
        known: Names of the model's adapters.

    Raises:
        ValueError: They are not a list of names of adapters.
    """
    valid = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(n, str) for n in names)
    check(valid, "adapter_names", names, f"a list with an adapter's name, or {BASE!r}, for each row")
    assert isinstance(names, list | tuple)
    for name in names:
        if name != BASE and name not in known:
            refuse_unknown("adapter_names", name, [*known, BASE])
    return list(names)


def repeats_of(args: Sequence[object], kwargs: Mapping[str, Any]) -> int:
    """Return how often `generate`, called with these arguments, repeats each row; 1 for a plain forward."""
    settings = [kwargs.get("generation_config"), *args]
    config = next((value for value in settings if hasattr(value, "num_return_sequences")), None)
    counts = [
        kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    ]
    return max(count for count in counts if isinstance(count, int))


@contextmanager
def mixed_batch(model: nn.Module, layer_class: type, names: list[str], repeats: int) -> Iterator[None]:
    """Give every adapted layer, and every module that is trained whole, the names of its rows' adapters.

    Args:
        model: The model.
        layer_class: Class of its adapted layers.
        names: Adapter of each row.
        repeats: How often generation repeats each row.
    """
    seen = {len(names): RowNames(names)}
    seen[len(names) * repeats] = RowNames(name for name in names for _ in range(repeats))

    def hand_over(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = seen.get(len(args[0]), seen[len(names)]) if args else seen[len(names)]
        if isinstance(module, AuxiliaryTrainingWrapper):  # which fails for an adapter without the module
            trained = adapters_of_wrapper(module)
            own = [name if name in trained else BASE for name in own]
        return args, {**kwargs, "adapter_names": own}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (layer_class, AuxiliaryTrainingWrapper)):
                handle = module.register_forward_pre_hook(hand_over, with_kwargs=True)
                stack.callback(handle.remove)
        yield
