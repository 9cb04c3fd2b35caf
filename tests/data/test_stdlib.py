"""The corpus and the docstring pairs: stable, without leaks, and with the docstring really taken out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hf_ext.data import (
    COMPLETION_END,
    PROMPT_END,
    SPLITS,
    DocstringPair,
    corpus_text,
    docstring_pairs,
    is_held_out,
    load_docstrings,
    split_of,
    stdlib,
    stdlib_modules,
)

ROOT = Path(__file__).resolve().parents[2]


@cache
def _pairs(split: str) -> list[DocstringPair]:
    return list(docstring_pairs(split))


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[stdlib._Function]]:
    """Return the functions that the corpus sees in a text."""

    def run(text: str) -> list[stdlib._Function]:
        path = tmp_path / "example.py"
        path.write_text(textwrap.dedent(text))
        # Named after the test: results are cached by name, and parsing the library again would be slow.
        monkeypatch.setattr(stdlib, "_module_files", lambda: {tmp_path.name: path})
        return list(stdlib._functions(tmp_path.name))

    return run


def test_modules_are_sorted_and_without_tests_or_tables() -> None:
    modules = stdlib_modules()
    assert list(modules) == sorted(modules)
    assert {"json", "json.decoder", "collections.abc", "logging.handlers"} <= set(modules)
    parts = {part for name in modules for part in name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "__init__", "__pycache__"}
    assert not {"encodings.cp1252", "html.entities", "pydoc_data.topics"} & set(modules)


def test_importing_the_package_loads_nothing_heavy() -> None:
    # Without hf_ext/__init__.py, which is not this package's matter.
    code = (
        "import sys, types; package = types.ModuleType('hf_ext'); package.__path__ = ['hf_ext']\n"
        "sys.modules['hf_ext'] = package\n"
        "import hf_ext.data; assert not {'torch', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_split_is_fixed_and_covers_whole_packages() -> None:
    # Written out, so that a change of the hash, which would put training text into the test split of
    # models already trained, cannot pass unseen.
    assert split_of("logging") == split_of("logging.handlers") == "test"
    assert split_of("random") == split_of("optparse") == "validation"
    assert split_of("json.decoder") == split_of("json") == split_of("no_such_module") == "train"
    assert split_of("_pydecimal") == split_of("decimal")
    assert split_of("_pyio") == split_of("io")
    assert is_held_out("http.client")
    assert not is_held_out("random")


def test_held_out_share_of_the_bytes() -> None:
    sizes = {split: sum(file.num_bytes for file in corpus_text(split)) for split in SPLITS}
    total = sum(sizes.values())
    assert 0.08 < sizes["test"] / total < 0.11
    assert 0.03 < sizes["validation"] / total < 0.08


@pytest.mark.parametrize("split", SPLITS)
def test_text_and_pairs_stay_on_their_side(split: str) -> None:
    modules = {file.module for file in corpus_text(split)} | {pair.module for pair in _pairs(split)}
    assert modules
    assert {split_of(module) for module in modules} == {split}


def test_no_function_of_a_held_out_module_is_in_training() -> None:
    def normal(text: str) -> str:
        return " ".join(text.split())

    held_out = [f for m in stdlib_modules() if split_of(m) != "train" for f in stdlib._functions(m)]
    sources = {normal(function.source) for function in held_out}
    docstrings = {normal(function.docstring or "") for function in held_out}
    long_docstrings = {text for text in docstrings if len(text) > 80}
    for pair in _pairs("train"):
        assert normal(pair.prompt.removesuffix(PROMPT_END)) not in sources, pair.qualname
        assert normal(pair.completion.removesuffix(COMPLETION_END)) not in long_docstrings, pair.qualname
    # The text for language modelling: functions long enough to be recognised.
    training = normal(" ".join(file.text for file in corpus_text("train")))
    leaked = [f for f in held_out if len(f.normal_source) > 80 and f.docstring is None]
    assert len(leaked) > 100
    assert not [f.qualname for f in leaked if f" {f.normal_source} " in training]


def test_a_function_copied_from_a_held_out_module_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = (
        "def copied(first, second):\n    total = first * first + second * second\n"
        "    return total ** 0.5 if total > 0 else 0.0\n"
    )
    secret = 'def secret(x):\n    """{}"""\n    return x\n'.format("A sentence long enough to be known. " * 3)
    held_out, train = tmp_path / "held.py", tmp_path / "train.py"
    held_out.write_text(copied + secret)
    train.write_text("A = 1\n" + copied + secret.replace("return x", "return -x") + "B = 2\n")
    assert is_held_out("http.fake")
    monkeypatch.setattr(stdlib, "_module_files", lambda: {"http.fake": held_out, "json.fake": train})
    stdlib._held_out_index.cache_clear()
    try:
        assert [file.text for file in corpus_text("train")] == ["A = 1\nB = 2\n"]
        assert [file.text for file in corpus_text("test")] == [copied + secret]
        assert list(docstring_pairs("train")) == []
        assert [pair.qualname for pair in docstring_pairs("test")] == ["secret"]
    finally:
        stdlib._held_out_index.cache_clear()


def test_no_prompt_twice() -> None:
    prompts = [pair.prompt for split in SPLITS for pair in _pairs(split)]
    assert len(prompts) == len(set(prompts))


def test_rows_are_equal_in_processes_with_other_hash_seeds() -> None:
    code = (
        "import hashlib; from itertools import islice; from hf_ext.data import docstring_pairs, corpus_text\n"
        "rows = [*docstring_pairs('test'), *islice(docstring_pairs('train'), 300)]\n"
        "rows += corpus_text('validation')\n"
        "print(len(rows), hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert int(outputs[0].split()[0]) > 600


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_hold_no_docstring_and_parse(split: str) -> None:
    for pair in _pairs(split):
        source = pair.prompt.removesuffix(PROMPT_END)
        assert source != pair.prompt
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) is None, pair.qualname
        assert pair.qualname.rsplit(".", 1)[-1] == node.name
        assert pair.completion.endswith(COMPLETION_END)
        assert '"""' not in pair.completion.removesuffix(COMPLETION_END)


@pytest.mark.parametrize(
    ("text", "source", "docstring"),
    [
        ('def f(x):\n    """Doc."""\n\n    # why\n    return x\n', "def f(x):\n    # why\n    return x",
         "Doc."),
        ('@a\n@b(\n    1)\ndef f():\n    "Doc."\n    pass\n', "@a\n@b(\n    1)\ndef f():\n    pass", "Doc."),
        ('def f(): "Doc."\n', "def f(): ...", "Doc."),
        ('def f(x): "Doc."; return x\n', "def f(x): return x", "Doc."),
        ('def f():\n    """Doc.\n\n      more\n    """\n', "def f():\n    ...", "Doc.\n\nmore"),
        ('def f():\n    """Doc."""; x = 1\n    return x\n', "def f():\n    x = 1\n    return x", "Doc."),
        ('def f():\n    "Döc. "  "two"  # say\n    return "ü"\n', 'def f():\n    return "ü"', "Döc. two"),
        ("async def f():\n    r'''Doc \\d.'''\n    await g()\n", "async def f():\n    await g()", "Doc \\d."),
        ("def f():\n    return 1\n", "def f():\n    return 1", None),
        ('class A:\n    def f(self):\n        """Doc."""\n        return """\nx\n"""\n',
         'def f(self):\n    return """\nx\n"""', "Doc."),
    ],
    ids=["plain", "decorators", "one line", "one line with code", "docstring only", "semicolon", "unicode",
         "async raw", "none", "method with text at column 0"],
)  # fmt: skip
def test_docstring_is_taken_out(
    describe: Callable[[str], list[stdlib._Function]], text: str, source: str, docstring: str | None
) -> None:
    (function,) = describe(text)
    assert (function.source, function.docstring) == (source, docstring)


def test_which_functions_are_seen(describe: Callable[[str], list[stdlib._Function]]) -> None:
    functions = describe(
        """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            def hidden(): ...
        else:
            def shown(): ...
        try:
            def tried(): ...
        except ImportError:
            def caught(): ...
        class A:
            class B:
                def method(self):
                    def closure(): ...
        """
    )
    assert [f.qualname for f in functions] == ["shown", "tried", "caught", "A.B.method"]


def test_a_second_string_is_not_taken_for_code(describe: Callable[[str], list[stdlib._Function]]) -> None:
    assert describe('def f():\n    """Doc."""\n    """Another."""\n') == []


def test_dataset_columns_and_rows() -> None:
    dataset = load_docstrings("validation")
    assert dataset.column_names == ["prompt", "completion", "module", "qualname"]
    for row, pair in zip(dataset, _pairs("validation"), strict=True):
        source, docstring = pair.prompt.removesuffix(PROMPT_END), pair.completion.removesuffix(COMPLETION_END)
        assert row["prompt"] == f"### Function\n{source}\n\n### What it does\n"
        assert row["completion"] == f"{docstring}\n### End"
        assert (row["module"], row["qualname"]) == (pair.module, pair.qualname)
    assert len(dataset) > 200


def test_bounds_are_kept() -> None:
    short = list(
        docstring_pairs("test", min_docstring_chars=40, max_docstring_chars=60, max_source_chars=200)
    )
    assert short
    for pair in short:
        assert 40 <= len(pair.completion.removesuffix(COMPLETION_END)) <= 60
        assert len(pair.prompt.removesuffix(PROMPT_END)) <= 200


@pytest.mark.parametrize("function", [corpus_text, docstring_pairs, load_docstrings])
def test_unknown_split_is_refused_with_a_hint(function: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"split must be one of .* got 'tset'; did you mean 'test'"):
        function("tset")


@pytest.mark.parametrize(
    ("bounds", "field"),
    [
        ({"min_docstring_chars": 0}, "min_docstring_chars"),
        ({"min_docstring_chars": 10, "max_docstring_chars": 9}, "max_docstring_chars"),
        ({"max_source_chars": 0}, "max_source_chars"),
    ],
)
def test_bounds_that_leave_nothing_are_refused(bounds: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .* got"):
        docstring_pairs("test", **bounds)
