"""The rules of the source tree, read from the source itself."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_ext._methods import METHODS, MethodRow
from hf_ext.core.registry import FOLDERS
from tests.registry_cases import methods

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_ext"
MODULES = sorted(PACKAGE.rglob("*.py"))
STANDARD = set(sys.stdlib_module_names)
HEAVY = {
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "matplotlib",
}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Yield each imported module by its absolute name, with its line; one in a function body counts too.

    Args:
        path: The source file.
        at_import: Only what runs when the module is imported: neither function bodies nor `if TYPE_CHECKING`.
    """
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), at_import):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            # `from .. import core` imports a module too; `from ..core.checks import check` a name of one.
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def _nodes(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child, at_import)


def ours(path: Path) -> list[tuple[str, int]]:
    return [(name, line) for name, line in imports(path) if name.split(".")[0] == "hf_ext"]


def found(path: Path, names: list[tuple[str, int]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} imports {name}" for name, line in names]


def kind_modules(*, public: bool) -> list[Path]:
    """Return the modules of the kind packages: those users import (public), or the families' bases."""
    folders = [PACKAGE / folder for folder in FOLDERS.values() if (PACKAGE / folder).is_dir()]
    paths = [
        path for folder in folders for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"
    ]
    return [path for path in paths if path.name.startswith("_") is not public]


def test_the_import_reader_resolves_relative_and_nested_imports(tmp_path: Path) -> None:
    path = PACKAGE / "adapters" / "sorsa.py"
    names = {name for name, _ in imports(path)}
    assert {"hf_ext.core.checks.check", "hf_ext.adapters._base.register_adapter", "torch.nn"} <= names
    distributed = {name for name, _ in imports(PACKAGE / "core" / "dist.py")}
    top = {name for name, _ in imports(PACKAGE / "core" / "dist.py", at_import=True)}
    assert "torch.distributed.tensor.DTensor" in distributed - top


def test_core_imports_torch_safetensors_yaml_and_the_standard_library_only() -> None:
    allowed = STANDARD | {"torch", "safetensors", "yaml"}
    wrong: list[str] = []
    for path in sorted((PACKAGE / "core").rglob("*.py")):
        foreign = [(name, line) for name, line in imports(path) if name.split(".")[0] not in allowed]
        own = ("hf_ext.core.", "hf_ext._compat.torch.")
        wrong += found(path, [(n, line) for n, line in foreign if not n.startswith(own)])
    assert wrong == []


def test_compat_imports_nothing_of_ours() -> None:
    assert [
        text for path in sorted((PACKAGE / "_compat").glob("*.py")) for text in found(path, ours(path))
    ] == []


def test_only_bases_of_kinds_and_no_method_import_compat() -> None:
    bases = set(kind_modules(public=False))
    importers = {path for path in MODULES if any(name.startswith("hf_ext._compat") for name, _ in ours(path))}
    in_kinds = {path for path in importers if path.parent.name in FOLDERS.values()}
    assert in_kinds <= bases
    assert not importers & set(kind_modules(public=True))
    in_core = {name for path in importers & set((PACKAGE / "core").rglob("*.py")) for name, _ in ours(path)}
    assert not {name for name in in_core if re.match(r"hf_ext\._compat\b(?!\.torch\.)", name)}


@pytest.mark.parametrize("path", kind_modules(public=True), ids=lambda path: path.stem)
def test_a_method_imports_core_and_bases_only(path: Path) -> None:
    kinds = "|".join(FOLDERS.values())
    base = re.compile(rf"hf_ext\.(core\b.*|({kinds})\._[a-z]\w*(\.\w+)?)$")
    assert found(path, [(name, line) for name, line in ours(path) if not base.match(name)]) == []


@pytest.mark.parametrize(
    "path", kind_modules(public=False), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_a_base_imports_core_compat_and_other_bases_only(path: Path) -> None:
    kinds = "|".join(FOLDERS.values())
    base = re.compile(rf"hf_ext\.(core\b.*|_compat\b.*|({kinds})\._[a-z]\w*(\.\w+)?)$")
    assert found(path, [(name, line) for name, line in ours(path) if not base.match(name)]) == []


@pytest.mark.parametrize("folder", ["adapters", "callbacks", "optimizers", "merging"])
def test_no_module_of_a_kind_imports_trl_or_a_trainer_at_import(folder: str) -> None:
    wrong: list[str] = []
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        names = list(imports(path, at_import=True))
        wrong += found(
            path, [(n, line) for n, line in names if re.match(r"trl\b|transformers\.(trainer\b|Trainer$)", n)]
        )
    assert wrong == []


@pytest.mark.parametrize("name", ["__init__.py", "_methods.py", "cli.py"])
def test_the_entry_modules_import_nothing_heavy(name: str) -> None:
    path = PACKAGE / name
    heavy = [
        (n, line) for n, line in imports(path, at_import=True) if n.split(".")[0] not in STANDARD | {"hf_ext"}
    ]
    kinds = "|".join(FOLDERS.values())
    heavy += [
        (n, line) for n, line in imports(path, at_import=True) if re.match(rf"hf_ext\.(core|{kinds})\b", n)
    ]
    assert found(path, heavy) == []


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_has_a_test_and_a_page(row: MethodRow) -> None:
    assert (ROOT / "tests" / FOLDERS[row.kind] / f"test_{row.name}.py").is_file()
    assert (ROOT / "docs" / "methods" / f"{row.name}.md").is_file()
    assert row.module.split(".")[:3] == ["hf_ext", FOLDERS[row.kind], row.name], (
        "the file has the method's name"
    )


def test_every_page_has_a_method() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {row.name for row in METHODS}


def test_every_test_of_a_kind_has_a_module() -> None:
    for folder in FOLDERS.values():
        stems = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
        modules = {path.stem.removeprefix("_") for path in (PACKAGE / folder).glob("*.py")}
        # One module may have several test files: test_<module>.py, test_<module>_<aspect>.py.
        assert [stem for stem in stems if not any(f"{stem}_".startswith(f"{m}_") for m in modules)] == []


def test_the_static_table_is_the_registry() -> None:
    registered = [
        (
            row.kind,
            row.name,
            row.summary,
            row.paper,
            row.config and row.config.__name__,
            row.target.__module__,
        )
        for kind, folder in FOLDERS.items()
        if (PACKAGE / folder).is_dir()
        for row in (case.values[0] for case in methods(kind, variants=False))
    ]
    assert [tuple(row) for row in METHODS] == registered


def test_make_sync_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/sync_registry.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("row", methods("adapter"))
def test_every_field_of_a_config_is_described_where_it_is_defined(row: object) -> None:
    config = row.config  # pyright: ignore[reportAttributeAccessIssue]
    classes = [cls for cls in config.__mro__ if cls.__module__.startswith("hf_ext.")]
    assert classes
    for cls in classes:
        own = {f.name for f in dataclasses.fields(cls) if f.name in inspect.get_annotations(cls)}
        own = {name for name in own if not name.startswith("_")}
        described = set(
            re.findall(r"^    (\w+): ", _section(inspect.getdoc(cls) or "", "Args"), re.MULTILINE)
        )
        assert own == described, f"{cls.__name__}: fields and the Args of its docstring differ"


def _section(docstring: str, title: str) -> str:
    match = re.search(rf"^{title}:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    return match.group(1) if match else ""


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_the_module_docstring_names_its_source_and_the_differences(row: MethodRow) -> None:
    module = importlib.import_module(row.module)
    source = module.__doc__ or ""
    assert "\nSource: " in source
    assert "\nDiffers from the paper" in source
    assert "REPLACE" not in inspect.getsource(module)
    if row.paper:
        assert row.paper.partition(":")[2] in source


UNSAFE = {
    "pickle": "import",
    "cloudpickle": "import",
    "dill": "import",
    "marshal": "import",
    "shelve": "import",
    "torch.load": "call",
    "torch.save": "call",
    "yaml.load": "call",
    "yaml.unsafe_load": "call",
    "yaml.full_load": "call",
    "numpy.load": "call",
    "np.load": "call",
    "eval": "call",
    "exec": "call",
    "os.system": "call",
}


def unsafe_calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ClassDef)
            and {ast.unparse(base) for base in node.bases} <= safe
            and node.bases
        ):
            safe = safe | {node.name}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        if UNSAFE.get(name) == "call" and not (name == "yaml.load" and given.get("Loader") in safe):
            yield f"calls {name}", call.lineno
        yield from (
            (f"sets {flag}", call.lineno)
            for flag in ("shell", "trust_remote_code")
            if given.get(flag) == "True"
        )


def test_the_reader_of_unsafe_calls_sees_them() -> None:
    source = """
class Mine(yaml.SafeLoader): ...
class Theirs(yaml.Loader): ...
yaml.load(text, Loader=Mine)
yaml.safe_load(text)
model.eval()
yaml.load(text, Loader=Theirs)
yaml.load(text)
eval(text)
run(text, shell=True)
"""
    assert sorted(line for _, line in unsafe_calls(ast.parse(source))) == [7, 8, 9, 10]


def test_nothing_runs_code_from_a_file() -> None:
    wrong: list[str] = []
    for path in MODULES:
        wrong += found(
            path, [(n, line) for n, line in imports(path) if UNSAFE.get(n.split(".")[0]) == "import"]
        )
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)}:{line} {what}" for what, line in unsafe_calls(tree)]
    assert wrong == []


def test_there_is_no_module_for_things_without_a_place() -> None:
    vague = re.compile(r"(utils?|helpers?|misc|common|new|.*_v\d+)$")
    assert [str(path) for path in MODULES if vague.match(path.stem)] == []


def test_no_module_outgrows_a_reader() -> None:
    # Twice the size that the guide asks to split at: a file past it does more than one thing.
    assert {path.name: size for path in MODULES if (size := len(path.read_text().splitlines())) > 800} == {}


def test_tests_use_neither_sleep_nor_mocks_of_torch() -> None:
    wrong: list[str] = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        wrong += found(
            path, [(n, line) for n, line in imports(path) if n in {"time.sleep"} or "mock" in n.split(".")]
        )
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"time.sleep", "asyncio.sleep"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} sleeps")
    assert wrong == []
