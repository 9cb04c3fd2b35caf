"""What an import loads and registers, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ext

HEAVY = ("torch", "numpy", "safetensors", "transformers", "peft", "trl", "accelerate", "datasets")


def run(code: str, **variables: str) -> str:
    """Run code in a fresh interpreter that sees this tree, and return what it prints."""
    root = str(Path(hf_ext.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_no_other_one() -> None:
    found = run(f"import sys, hf_ext; print([name for name in {HEAVY} if name in sys.modules])")
    assert found == "[]"


def test_the_method_table_needs_no_torch() -> None:
    code = "import sys; from hf_ext._methods import METHODS; print('torch' in sys.modules, METHODS[0].kind)"
    assert run(code) == "False adapter"


REGISTERED = """
from hf_ext._methods import METHODS
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
for row in METHODS:
    if row.kind == "adapter":
        member = peft.PeftType[row.name.upper()]
        assert PEFT_TYPE_TO_CONFIG_MAPPING[member].__name__ == row.config
        assert member in PEFT_TYPE_TO_TUNER_MAPPING
assert "trl" not in sys.modules
assert not any(type(finder).__name__ == "_AfterPeft" for finder in sys.meta_path)
"""


def test_peft_imported_later_registers_every_type() -> None:
    run(
        f"""
import importlib.util, sys
import hf_ext
# transformers and accelerate look for the spec, without importing it, to know whether PEFT is installed.
assert importlib.util.find_spec("peft") is not None
assert "peft" not in sys.modules
import peft
{REGISTERED}
assert (peft.__spec__.origin, peft.__name__) == (peft.__file__, "peft")
# Importing all once more registers nothing twice.
importlib.reload(hf_ext)
assert hf_ext.core.registry.names("adapter") == sorted(set(hf_ext.core.registry.names("adapter")))
"""
    )


def test_peft_imported_earlier_registers_every_type() -> None:
    run(f"import sys, peft, hf_ext\n{REGISTERED}")


def test_without_peft_the_package_still_imports(tmp_path: Path) -> None:
    code = """
import sys
class NoPeft:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
sys.meta_path.insert(0, NoPeft())
import hf_ext
try:
    import peft
except ModuleNotFoundError as error:
    print(hf_ext.__version__, error.name)
"""
    assert run(code) == f"{hf_ext.__version__} peft"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hf_ext' has no attribute 'adaptors'"):
        _ = hf_ext.adaptors  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", hf_ext._SUBPACKAGES)
def test_every_announced_subpackage_can_be_reached_from_the_top(name: str) -> None:
    assert getattr(hf_ext, name).__name__ == f"hf_ext.{name}"
    assert name in dir(hf_ext)


def test_every_public_subpackage_is_announced() -> None:
    folder = Path(hf_ext.__file__).parent
    packages = {path.parent.name for path in folder.glob("[a-z]*/__init__.py")}
    modules = {path.stem for path in folder.glob("[a-z]*.py")} - {"cli"}
    assert packages | modules == set(hf_ext._SUBPACKAGES)
