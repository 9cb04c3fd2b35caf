"""Cases for `parametrize`, taken from the registry: a registered method is a tested one."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest

from hf_ext.core.registry import FOLDERS
from hf_ext.core.registry import methods as registered_methods


def methods(
    kind: str, *, supports: Iterable[str] = (), lacks: Iterable[str] = (), variants: bool = True
) -> list[Any]:
    """Return one `pytest.param` with the registry row for each method of a kind, and for each of its forms.

    Args:
        kind: One of the registry's kinds.
        supports: Capability flags that a row must have, one name or several.
        lacks: Capability flags that it must not have.
        variants: Whether to take the methods' further forms too; not worth it for what starts a process.
    """
    importlib.import_module(f"hf_ext.{FOLDERS[kind]}")  # registers its methods
    wanted = {supports} if isinstance(supports, str) else set(supports)
    unwanted = {lacks} if isinstance(lacks, str) else set(lacks)
    forms = [form for row in registered_methods(kind) for form in row.forms()]
    return [
        pytest.param(form, id=name)
        for name, form in forms
        if wanted <= form.supports and not unwanted & form.supports and (variants or name == form.name)
    ]


def refused_settings(kind: str) -> list[Any]:
    """Return one `pytest.param` (row, settings) for each setting that a method must refuse."""
    cases = (
        (row, dict(bad))
        for row in (case.values[0] for case in methods(kind, variants=False))
        for bad in row.bad_kwargs
    )
    return [
        pytest.param(row, bad, id=f"{row.name}-{list(bad)[-1]}={list(bad.values())[-1]}")
        for row, bad in cases
    ]
