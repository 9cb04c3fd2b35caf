"""Accelerate's launcher, which is a command line without an API, and what it knows of; checked on 1.15."""

from __future__ import annotations

from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser

__all__ = ["know_model", "launch_command", "launch_command_parser"]


def know_model(accelerator: Any, model: Any) -> None:
    """Let an Accelerator know of a model that it has not prepared, so that an evaluation does not either."""
    accelerator._models.append(model)
