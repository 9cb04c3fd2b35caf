"""`make new` in a copy of the tree: what it writes passes tests, what it refuses writes nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEEP = ("hf_ext", "scripts", "docs", "tests", "README.md", "pyproject.toml")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.png")
    for name in KEEP:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, capture_output=True, text=True, env=environment, check=False
    )


def files(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.suffix in {".py", ".md"}}


@pytest.mark.parametrize("kind", ["adapter", "callback", "merge", "trainer"])
def test_a_scaffolded_method_is_clean_registered_and_passes_tests(tree: Path, kind: str) -> None:
    folder, exported, whole = KINDS[kind]
    new = [f"hf_ext/{folder}/gated_toy.py", f"tests/{folder}/test_gated_toy.py", "docs/methods/gated_toy.md"]
    generated = [f"hf_ext/{folder}/__init__.py", "hf_ext/_methods.py", "README.md", "docs/index.md"]
    written = load_script("new_method", tree).scaffold(kind, "gated_toy")
    assert [str(path.relative_to(tree)) for path in written] == new

    # The export list is stale in the worst way: it imports a module that is gone.
    exports = tree / "hf_ext" / folder / "__init__.py"
    exports.write_text('"""Old."""\n\nfrom .gone import GoneConfig as GoneConfig\n')
    check = run(tree, "scripts/sync_registry.py", "--check")
    assert check.returncode == 1, check.stderr
    assert [line.split()[0] for line in check.stdout.splitlines()] == generated
    assert "GoneConfig" in exports.read_text(), "--check writes nothing"

    sync = run(tree, "scripts/sync_registry.py")
    assert sync.returncode == 0, sync.stderr
    assert exports.read_text().count("GoneConfig") == 0
    assert f"from .gated_toy import {exported} as {exported}" in exports.read_text()
    assert '"gated_toy"' in (tree / "hf_ext" / "_methods.py").read_text()
    assert "(docs/methods/gated_toy.md)" in (tree / "README.md").read_text()
    assert "(methods/gated_toy.md)" in (tree / "docs" / "index.md").read_text()

    for command in (["check"], ["format", "--check"]):
        lint = run(tree, "-m", "ruff", *command, *new[:2], *generated[:2])
        assert lint.returncode == 0, lint.stdout

    # Its own tests, and of the contract suite what shows that the method is whole.
    suites = [new[1], f"tests/contracts/test_{kind}s.py", "-p", "no:cacheprovider"]
    tests = run(tree, "-m", "pytest", "-q", "-x", "-k", f"gated_toy and ({whole})", *suites)
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", tests.stdout)[0]) >= {"merge": 9, "trainer": 8}.get(kind, 12)


# Folder, a name that is exported, and the tests of the contract suite that are run.
KINDS = {
    "adapter": (
        "adapters",
        "GatedToyConfig",
        "test_gated_toy or start_equals_base or only_adapter_tensors or save_and_load or config_round_trip "
        "or merge_and_unmerge or delta_weight or conv1d or gradient_checkpointing or bad_settings "
        "or unknown_field",
    ),
    "callback": (
        "callbacks",
        "GatedToyCallback",
        "test_gated_toy or bad_settings or unknown_setting or json or neutral or first_added or pickle or "
        "truncated or afresh or nothing_is_left or events_alone or two_of_one_class or logged",
    ),
    "merge": (
        "merging",
        "GatedToy",
        "test_gated_toy or bad_settings or unknown_setting or json or bits or order or zero or refused or "
        "loads",
    ),
    "trainer": (
        "trainers",
        "GatedToyConfig",
        "test_gated_toy or bad_settings or restates or neutral or missing or empty_text",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adaptor", "foo"), "kind must be one of 'adapter'.*did you mean 'adapter'"),
        (("adapter", "Foo"), "name must be a lower-case identifier, got 'Foo'"),
        (("adapter", "foo-bar"), "name must be a lower-case identifier, got 'foo-bar'"),
        (("adapter", "../foo"), "name must be a lower-case identifier"),
        (("adapter", "_foo"), "name must be a lower-case identifier, got '_foo'"),
        (("adapter", "lambda"), "name must be a lower-case identifier, got 'lambda'"),
        (("adapter", ""), "name must be a lower-case identifier, got ''"),
        (("adapter", "sorsa"), "one that no method has, got 'sorsa'.*taken by the adapter"),
        (("adapter", "lora"), "one that PEFT has no type of, got 'lora'"),
        (("adapter", "export"), r"hf_ext/adapters/export\.py exists"),
        (("optimizer", "foo"), r"kind 'optimizer' has no base module yet: write hf_ext/optimizers/_base\.py"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    arguments: tuple[str, str], message: str
) -> None:
    scaffold = load_script("new_method")
    before = files(ROOT / "hf_ext") | files(ROOT / "docs")
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as caught:
        scaffold.scaffold(*arguments)
    assert re.search(message, str(caught.value)), caught.value
    assert files(ROOT / "hf_ext") | files(ROOT / "docs") == before


def test_a_refusal_on_the_command_line_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("new_method").main(["adapter", "Foo"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "new_method: name must be a lower-case identifier, got 'Foo'"
    ]


def test_class_names_are_camel_case() -> None:
    stem = load_script("new_method").class_stem
    assert [stem("sorsa"), stem("gated_toy"), stem("a1_b")] == ["Sorsa", "GatedToy", "A1B"]


def test_export_lists_refuse_what_would_mislead() -> None:
    export_list = load_script("sync_registry").export_list
    module = types.ModuleType("some")
    with pytest.raises(SystemExit, match="states its exports in __all__"):
        export_list("Kind", [("some", module)])
    module.__all__ = ["Missing"]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SystemExit, match="names 'Missing', which the module does not have"):
        export_list("Kind", [("some", module)])
    module.Missing = object  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SystemExit, match="'Missing' is exported by some and by other"):
        export_list("Kind", [("some", module), ("other", module)])
    assert export_list("Kind", [("some", module)]).endswith("from .some import Missing as Missing\n")


def load_script(name: str, tree: Path = ROOT) -> Any:
    """Import a script of the tree, without the entry that it puts before the import path."""
    spec = importlib.util.spec_from_file_location(name, tree / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module
