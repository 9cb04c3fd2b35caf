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


def test_scaffolded_methods_are_clean_registered_and_pass_tests(tree: Path) -> None:
    # One of each kind in one tree: most of the time is imports.
    generated: list[str] = []
    new: list[str] = []
    wanted: list[str] = []
    for kind, (name, folder, _, tests) in KINDS.items():
        own = [f"hf_ext/{folder}/{name}.py", f"tests/{folder}/test_{name}.py", f"docs/methods/{name}.md"]
        written = load_script("new_method", tree).scaffold(kind, name)
        assert [str(path.relative_to(tree)) for path in written] == own
        new += own
        generated.append(f"hf_ext/{folder}/__init__.py")
        wanted.append(f"{name} and (test_{name} or {tests})")
        # The export list is stale in the worst way: it imports a module that is gone.
        exports = tree / "hf_ext" / folder / "__init__.py"
        exports.write_text('"""Old."""\n\nfrom .gone import GoneConfig as GoneConfig\n')
    tables = ["hf_ext/_methods.py", "README.md", "docs/index.md"]

    check = run(tree, "scripts/sync_registry.py", "--check")
    assert check.returncode == 1, check.stderr
    assert {line.split()[0] for line in check.stdout.splitlines()} == {*generated, *tables}
    sync = run(tree, "scripts/sync_registry.py")
    assert sync.returncode == 0, sync.stderr
    for name, folder, exported, _ in KINDS.values():
        text = (tree / "hf_ext" / folder / "__init__.py").read_text()
        assert text.count("GoneConfig") == 0
        assert f"from .{name} import {exported} as {exported}" in text
        assert f'"{name}"' in (tree / "hf_ext" / "_methods.py").read_text()
        assert f"(docs/methods/{name}.md)" in (tree / "README.md").read_text()
        assert f"(methods/{name}.md)" in (tree / "docs" / "index.md").read_text()

    sources = [path for path in (*new, *generated, tables[0]) if path.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        lint = run(tree, "-m", "ruff", *command, *sources)
        assert lint.returncode == 0, lint.stdout

    # Their own tests, and of the contract suites what shows that the methods are whole.
    suites = [path for path in new if path.startswith("tests/")]
    suites += [f"tests/contracts/test_{kind}s.py" for kind in KINDS]
    chosen = " or ".join(f"({names})" for names in wanted)
    done = run(tree, "-m", "pytest", "-q", "-x", "-rA", "-p", "no:cacheprovider", "-k", chosen, *suites)
    assert done.returncode == 0, done.stdout[-4000:]
    for name, least in zip((row[0] for row in KINDS.values()), (12, 12, 9, 8), strict=True):
        assert len(re.findall(rf"^PASSED .*{name}", done.stdout, re.MULTILINE)) >= least, name


# Name, folder, a name that is exported, and the tests of the contract suite that are run, by kind.
KINDS = {
    "adapter": (
        "gated_low_rank",
        "adapters",
        "GatedLowRankConfig",
        "start_equals_base or only_adapter_tensors or save_and_load or config_round_trip "
        "or merge_and_unmerge or delta_weight or conv1d or gradient_checkpointing or bad_settings "
        "or unknown_field",
    ),
    "callback": (
        "gated_rate",
        "callbacks",
        "GatedRateCallback",
        "bad_settings or unknown_setting or json or neutral or first_added or pickle or "
        "truncated or afresh or nothing_is_left or events_alone or two_of_one_class or logged",
    ),
    "merge": (
        "gated_mean",
        "merging",
        "GatedMean",
        "bad_settings or unknown_setting or json or bits or order or zero or refused or loads",
    ),
    "trainer": (
        "gated_loss",
        "trainers",
        "GatedLossConfig",
        "bad_settings or restates or neutral or missing or empty_text",
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
