"""Pages: links lead somewhere, Python blocks are Python, and the README's example runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile_and_their_imports_of_ours_exist(page: Path) -> None:
    import importlib

    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_ext":
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_name_make_targets_and_files_that_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for block in [*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))]:
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"] and all(re.fullmatch(r"[\w-]+(=\S*)?", word) for word in words):
                assert {word for word in words[1:] if "=" not in word} <= targets, line
            recipes = [word for word in words if word.startswith(("examples/", "scripts/", "benchmarks/"))]
            assert [path for path in recipes if not (ROOT / path).exists()] == [], line


def test_the_readme_example_runs(tmp_path: Path) -> None:
    example = "\n".join(blocks(ROOT / "README.md", "python"))
    # One step instead of twenty: the examples' own number is for a reader.
    assert example.count("max_steps=20") == 2
    done = subprocess.run(
        [sys.executable, "-c", example.replace("max_steps=20", "max_steps=1, use_cpu=True")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sorsa-run" / "adapter" / "adapter_model.safetensors").is_file()
    assert '"peft_type": "LORA"' in (tmp_path / "sorsa-run" / "lora" / "adapter_config.json").read_text()


def test_the_readme_tree_names_what_exists() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("hf_ext/"))
    for line in tree.splitlines():
        folder = ROOT / "hf_ext" if line.startswith(" ") else ROOT
        assert (folder / line.split()[0]).exists(), line
