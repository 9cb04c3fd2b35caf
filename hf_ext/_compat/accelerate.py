"""Accelerate's launcher, which is a command line without an API, checked on 1.15."""

from __future__ import annotations

from accelerate.commands.launch import launch_command, launch_command_parser

__all__ = ["launch_command", "launch_command_parser"]
