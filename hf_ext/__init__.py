"""Fine-tuning methods as drop-in pieces for transformers, PEFT, TRL and Accelerate.

Importing this package registers every adapter type with PEFT, so that `peft.PeftModel.from_pretrained` and
`get_peft_model` know them. If PEFT has not been imported yet, registration waits until it is: importing the
package alone loads neither torch nor PEFT nor TRL.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = ("adapters", "assets", "callbacks", "core", "data", "hub", "merging", "trainers", "training")


def __getattr__(name: str) -> Any:
    if name == "attach":
        return importlib.import_module(f"{__name__}.callbacks._attach").attach
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBPACKAGES, "attach"])


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Runs the registration when PEFT's own import has ended, then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            # Not before: transformers looks for PEFT's spec, without importing it, to know if it is there.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(f"{__name__}.adapters")

        spec.loader.exec_module = then_register
        return spec


def _register_with_peft() -> None:
    peft: Any = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        importlib.import_module(f"{__name__}.adapters")
    elif not any(type(finder).__name__ == _AfterPeft.__name__ for finder in sys.meta_path):  # reloaded
        sys.meta_path.insert(0, _AfterPeft())


_register_with_peft()
