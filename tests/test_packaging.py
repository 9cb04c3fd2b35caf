"""A wheel of this tree, installed into an empty environment, is the whole library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hf_ext

ROOT = Path(__file__).resolve().parents[1]


def call(*command: str | Path, cwd: Path, **variables: str) -> str:
    # What the interpreter of the tests has on its path must not leak into the one under test.
    environment = {
        k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by way of the source distribution, in a copy, so that the tree stays clean."""
    tree = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.partial")
    shutil.copytree(ROOT / "hf_ext", tree / "hf_ext", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    # No isolation: the build backend that is installed here, hence no network.
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree, cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (found,) = distributions.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment that holds the wheel, and sees this one's other packages but not this tree."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    call(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python",
        "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder,
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    # Appended after the environment's own packages; a .pth in a folder added this way is not read, so an
    # editable install of this tree stays out.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def files_of(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("hf_ext/")}
    assert package == files_of(ROOT / "hf_ext")
    assert {name.split("/")[0] for name in names - package} == {f"hf_ext-{hf_ext.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_the_package_too(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert files_of(ROOT / "hf_ext") <= names


def test_the_metadata_says_what_this_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "hf-ext"
    assert metadata["Version"] == hf_ext.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"optim", "plot", "tune", "deepspeed", "dev", "docs"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0] for line in required} >= {
        "torch",
        "transformers",
        "peft",
        "trl",
        "accelerate",
    }
    assert [line for line in required if "<" in line or "==" in line] == [], "lower bounds only"


def test_every_distribution_that_the_package_imports_is_required(wheel: Path) -> None:
    import ast
    from importlib.metadata import packages_distributions

    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    required = {
        line.split(">=")[0].split("[")[0].lower().replace("-", "_")
        for line in metadata.get_all("Requires-Dist", [])
        if not line.endswith(("extra == 'dev'", 'extra == "dev"', "extra == 'docs'", 'extra == "docs"'))
    }
    distribution = packages_distributions()
    missing: set[str] = set()
    for path in (ROOT / "hf_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"hf_ext"}:
                owners = {owner.lower().replace("-", "_") for owner in distribution.get(top, [top])}
                missing |= {f"{path.name}: {top}"} if not owners & required else set()
    assert missing == set()


def test_the_installed_library_is_the_one_that_is_imported(installed: Path, tmp_path: Path) -> None:
    code = """
import sys, hf_ext
assert hf_ext.__file__.startswith(sys.prefix), hf_ext.__file__
assert "torch" not in sys.modules
import peft
from hf_ext._methods import METHODS
assert {row.name.upper() for row in METHODS if row.kind == "adapter"} <= set(peft.PeftType.__members__)
from hf_ext.adapters import SorsaConfig
assert sys.modules["hf_ext.adapters"].__file__.startswith(sys.prefix)
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = AutoTokenizer.from_pretrained(folder)("import os", return_tensors="pt")
print(tuple(model(**tokens).logits.shape)[0], model.config.model_type)
"""
    out = call(installed / "bin" / "python", "-c", code, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert out.splitlines()[-1] == "1 llama"


def test_the_command_lists_the_methods_and_their_fields(installed: Path, tmp_path: Path) -> None:
    listed = call(installed / "bin" / "hf-ext", "list", cwd=tmp_path)
    assert "sorsa" in listed
    assert "adapter" in listed


def test_the_command_exits_with_an_error_for_what_it_does_not_know(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "bin" / "hf-ext", "info", "sorsaa"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "sorsa" in done.stderr
    assert "Traceback" not in done.stderr
