"""What a LoRA's start has done to its base, from PEFT's name of the start."""

from __future__ import annotations

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def changes_base(start: object) -> bool:
    """Return whether a value of `init_lora_weights` makes PEFT write a residual into the base."""
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)
