"""Weights that a trainer of TRL's hands to another engine for generation (vLLM), checked on 1.16."""

from __future__ import annotations

from typing import Any

LAST_LOADED = "_last_loaded_step"  # the step whose weights are there; another step's are handed over


def hand_over_anew(trainer: Any) -> None:
    """Have the weights handed over again within the same step; nothing for a trainer without an engine."""
    if hasattr(trainer, LAST_LOADED):
        setattr(trainer, LAST_LOADED, -1)
