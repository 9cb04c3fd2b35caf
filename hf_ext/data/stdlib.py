"""The standard library of the running Python as a corpus and as a source -> docstring data set.

Every installation has this text, so a first run and every test get real data without a network. One Python
version gives the same rows in the same order in every process: modules are sorted by name and a module's
split is a checksum of its name.

Splits are decided per top-level module, so a package is wholly on one side, and a private twin stands with
its public module (`_pydecimal` with `decimal`). The embedded model saw only `train`; `validation` is for
choosing learning rates, `test` for reported numbers. Library authors copy functions between modules, so
whatever stands verbatim in a `test` module is taken out of `validation` and `train`, and whatever stands in
a `validation` module out of `train`.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import sysconfig
import tokenize
import zlib
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ext.core.checks import check, check_choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datasets import Dataset

SPLITS = ("train", "validation", "test")

# The newlines around the quotes keep the border between prompt and completion on a border of tokens, so
# that the tokens of the prompt are a prefix of the tokens of prompt + completion.
PROMPT_END = '\n"""\n'
COMPLETION_END = '\n"""'

# The form of the fine-tuning task. The embedded model has read its training modules in the plain form above;
# a form that it has not met leaves fine-tuning something to learn, as a chat template does for a base model.
TASK_FORM = "### Function\n{source}\n\n### What it does\n"
TASK_END = "\n### End"

# Shares in per cent of the hash range. The salt was chosen once, by the sizes and names of the modules that
# fall on each side alone, so that about a tenth of the bytes is held out and no package dominates them.
_SALT = "hf_ext/26/"
_TEST_SHARE = 9
_VALIDATION_SHARE = 5

# Unit tests are left out because they quote the modules they test; the others are no Python source.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled"})
# Written by a program from other files: tables, not code that a person wrote.
_GENERATED_MODULES = frozenset({"html.entities", "pydoc_data.topics"})
_GENERATED_MARK = b"gencodec.py"  # first line of the character tables in `encodings`

# Shorter functions and docstrings coincide by chance (`def close(self): ...`) and give nothing away.
_TELLTALE_CHARS = 80

_FUNCTION_NODES = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class CorpusFile:
    """Text of one module for language-model training.

    Args:
        module: Dotted name.
        text: Source; lines end in a line feed alone.
    """

    module: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8, bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class DocstringPair:
    """One function and its docstring in the prompt/completion form of TRL.

    Args:
        prompt: Dedented source without the docstring, then `PROMPT_END`.
        completion: Docstring after `inspect.cleandoc`, then `COMPLETION_END`.
        module: Dotted name of the module.
        qualname: Name of the function inside the module, `Class.method` for a method.
    """

    prompt: str
    completion: str
    module: str
    qualname: str


@dataclass(frozen=True)
class _Function:
    """A function as it stands in a file; `first` and `last` are its lines counted from 1, both included."""

    module: str
    qualname: str
    source: str  # dedented, docstring removed
    docstring: str | None  # cleaned
    first: int
    last: int

    @property
    def normal_source(self) -> str:
        return " ".join(self.source.split())

    @property
    def normal_docstring(self) -> str:
        return " ".join((self.docstring or "").split())


@dataclass(frozen=True)
class _Index:
    """Normalised sources and long docstrings of a set of modules, to recognise copies."""

    sources: frozenset[str]
    docstrings: frozenset[str]

    def knows_pair(self, function: _Function) -> bool:
        """Tell whether this source, however short, or this long docstring is in the set."""
        return function.normal_source in self.sources or function.normal_docstring in self.docstrings

    def knows_text(self, function: _Function) -> bool:
        """Tell whether the function's text would give away text of the set."""
        copied = len(function.normal_source) > _TELLTALE_CHARS and function.normal_source in self.sources
        return copied or function.normal_docstring in self.docstrings


def stdlib_modules() -> dict[str, Path]:
    """Return the dotted name and file of every module of the corpus, sorted by name.

    Left out: test packages, tables written by a program, and anything that the running Python does not list
    in `sys.stdlib_module_names`, such as what an installer put beside the standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for top in sys.stdlib_module_names:
        for path in [root / f"{top}.py", *(root / top).rglob("*.py")]:
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not path.is_file() or _SKIPPED_FOLDERS & set(parts) or name in _GENERATED_MODULES:
                continue
            if top == "encodings" and _GENERATED_MARK in path.read_bytes()[:200]:
                continue
            found[name] = path
    return dict(sorted(found.items()))


def split_of(module: str) -> str:
    """Return the split of a module, decided by a checksum of its top-level name alone.

    Args:
        module: Dotted name; it need not exist.
    """
    top = module.split(".", 1)[0]
    # `_pydecimal` is `decimal` written in Python, `_strptime` the inside of `time.strptime`: a private twin
    # on the other side would give the held-out module away.
    top = top.removeprefix("_py") if top.startswith("_py") else top.lstrip("_")
    # crc32 and not hash(), which changes with PYTHONHASHSEED.
    place = zlib.crc32(f"{_SALT}{top}".encode()) % 100
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def is_held_out(module: str) -> bool:
    """Tell whether a module belongs to the `test` split, which no training text may contain."""
    return split_of(module) == "test"


def corpus_text(split: str) -> Iterator[CorpusFile]:
    """Yield the modules of a split in order of their names, for language-model training.

    From `validation` and `train` the functions that also stand in a split held out from them are cut;
    `test` files are whole.

    Args:
        split: "train", "validation" or "test".

    Raises:
        ValueError: The split is unknown.
    """
    check_choice("split", split, SPLITS)
    return _corpus_text(split)


def docstring_pairs(
    split: str,
    *,
    min_docstring_chars: int = 24,
    max_docstring_chars: int = 600,
    max_source_chars: int = 1200,
) -> Iterator[DocstringPair]:
    """Yield the functions and methods of a split with their docstrings, in order of module and line.

    Left out: functions inside functions or under `if TYPE_CHECKING`, docstrings that hold the closing
    quotes, a prompt seen before, and whatever also stands in a split held out from this one.

    Args:
        split: "train", "validation" or "test".
        min_docstring_chars: Shortest docstring kept, characters after cleaning, at least 1.
        max_docstring_chars: Longest docstring kept, characters after cleaning.
        max_source_chars: Longest source kept, characters without the docstring. The defaults keep a pair
            within about 512 tokens of the embedded tokenizer.

    Raises:
        ValueError: The split is unknown, or a bound leaves nothing.
    """
    check_choice("split", split, SPLITS)
    check(min_docstring_chars >= 1, "min_docstring_chars", min_docstring_chars, "at least 1")
    rule = f"at least min_docstring_chars ({min_docstring_chars})"
    check(max_docstring_chars >= min_docstring_chars, "max_docstring_chars", max_docstring_chars, rule)
    check(max_source_chars >= 1, "max_source_chars", max_source_chars, "at least 1")
    return _docstring_pairs(split, min_docstring_chars, max_docstring_chars, max_source_chars)


def load_docstrings(
    split: str,
    *,
    min_docstring_chars: int = 24,
    max_docstring_chars: int = 600,
    max_source_chars: int = 1200,
) -> Dataset:
    """Return the source -> docstring task of a split as a data set, ready for TRL's trainers.

    A prompt is `TASK_FORM` with the function's source (without the docstring), a completion the docstring and
    `TASK_END`.

    Args:
        split: "train", "validation" or "test".
        min_docstring_chars: Shortest docstring kept, characters after cleaning, at least 1.
        max_docstring_chars: Longest docstring kept, characters after cleaning.
        max_source_chars: Longest source kept, characters without the docstring.

    Returns:
        Columns `prompt`, `completion`, `module`, `qualname`, all strings.

    Raises:
        ValueError: The split is unknown, or a bound leaves nothing.
    """
    from datasets import Dataset

    pairs = list(
        docstring_pairs(
            split,
            min_docstring_chars=min_docstring_chars,
            max_docstring_chars=max_docstring_chars,
            max_source_chars=max_source_chars,
        )
    )
    return Dataset.from_dict(
        {
            "prompt": [TASK_FORM.format(source=pair.prompt.removesuffix(PROMPT_END)) for pair in pairs],
            "completion": [pair.completion.removesuffix(COMPLETION_END) + TASK_END for pair in pairs],
            "module": [pair.module for pair in pairs],
            "qualname": [pair.qualname for pair in pairs],
        }
    )


def _corpus_text(split: str) -> Iterator[CorpusFile]:
    index = _held_out_index(split)
    for module in _modules_of(split):
        text = _source_text(module)
        if text is None:
            continue
        copied = [function for function in _functions(module) if index.knows_text(function)]
        if copied:
            cut = {line for function in copied for line in range(function.first, function.last + 1)}
            lines = text.splitlines(keepends=True)
            text = "".join(line for number, line in enumerate(lines, 1) if number not in cut)
        if text:
            yield CorpusFile(module, text)


def _docstring_pairs(
    split: str, min_docstring_chars: int, max_docstring_chars: int, max_source_chars: int
) -> Iterator[DocstringPair]:
    index = _held_out_index(split)
    seen: set[str] = set()
    for module in _modules_of(split):
        for function in _functions(module):
            docstring = function.docstring or ""
            if not min_docstring_chars <= len(docstring) <= max_docstring_chars:
                continue
            if len(function.source) > max_source_chars or '"""' in docstring:
                continue
            if function.source in seen or index.knows_pair(function):
                continue
            seen.add(function.source)
            prompt, completion = function.source + PROMPT_END, docstring + COMPLETION_END
            yield DocstringPair(prompt, completion, module, function.qualname)


def _modules_of(split: str) -> list[str]:
    return [module for module in _module_files() if split_of(module) == split]


@lru_cache(maxsize=1)
def _module_files() -> dict[str, Path]:
    return stdlib_modules()


@lru_cache(maxsize=len(SPLITS))
def _held_out_index(split: str) -> _Index:
    """Index the splits that must not leak into this one: those after it in `SPLITS`."""
    later = SPLITS[SPLITS.index(split) + 1 :]
    functions = [f for name in later for module in _modules_of(name) for f in _functions(module)]
    return _Index(
        sources=frozenset(function.normal_source for function in functions),
        docstrings=frozenset(
            text for text in (f.normal_docstring for f in functions) if len(text) > _TELLTALE_CHARS
        ),
    )


def _source_text(module: str) -> str | None:
    """Return a module's text, or None when its bytes are not in the encoding that it declares."""
    data = _module_files()[module].read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None
    # A form feed separates pages in some files; str.splitlines would take it for the end of a line.
    return text.replace("\r\n", "\n").replace("\f", "")


@cache
def _functions(module: str) -> tuple[_Function, ...]:
    """Return the functions and methods of a module in the order of their lines."""
    text = _source_text(module)
    if text is None:
        return ()
    try:
        tree = ast.parse(text)
    except SyntaxError:  # source for another Python version, kept as an example
        return ()
    lines = text.split("\n")
    found = (_describe(module, qualname, node, lines) for qualname, node in _walk(tree.body, ""))
    return tuple(function for function in found if function is not None)


def _walk(
    body: Iterable[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions at module and class level, through if, try and with, not inside other functions."""
    for node in body:
        if isinstance(node, _FUNCTION_NODES):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _walk(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _walk(node.body, prefix)
            yield from _walk(node.orelse, prefix)
        elif isinstance(node, ast.Try):
            for handler in [node, *node.handlers]:
                yield from _walk(handler.body, prefix)
            yield from _walk([*node.orelse, *node.finalbody], prefix)
        elif isinstance(node, ast.With):
            yield from _walk(node.body, prefix)


def _describe(
    module: str, qualname: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> _Function | None:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or node.lineno
    raw = ast.get_docstring(node, clean=False)
    source = _without_docstring(node, lines, first, last) if raw is not None else lines[first - 1 : last]
    indent = node.col_offset
    # By the column of `def` and not textwrap.dedent: a string or comment at column 0 inside the function
    # would stop the latter.
    dedented = "\n".join(line[min(indent, len(line) - len(line.lstrip())) :].rstrip() for line in source)
    function = _Function(module, qualname, dedented.strip("\n"), None, first, last)
    if raw is None:
        return function
    try:
        (parsed,) = ast.parse(dedented).body
    except (SyntaxError, ValueError):  # not one statement: the lines are shared with other code
        return None
    # A second string after the docstring would take its place.
    if isinstance(parsed, _FUNCTION_NODES) and ast.get_docstring(parsed) is not None:
        return None
    return replace(function, docstring=inspect.cleandoc(raw).strip())


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], first: int, last: int
) -> list[str]:
    """Return the lines of a function that has a docstring, without it."""
    doc = node.body[0]
    end_lineno, end_col = doc.end_lineno or doc.lineno, doc.end_col_offset or 0
    # The offsets of ast count bytes of UTF-8.
    before = lines[doc.lineno - 1].encode()[: doc.col_offset].decode()
    if len(node.body) == 1:  # something must stand for the body
        after = lines[end_lineno - 1].encode()[end_col:].decode()
        return [*lines[first - 1 : doc.lineno - 1], before + "..." + after, *lines[end_lineno:last]]
    following = node.body[1]
    if following.lineno == end_lineno:  # `"text"; statement`
        rest = lines[end_lineno - 1].encode()[following.col_offset :].decode()
        return [*lines[first - 1 : doc.lineno - 1], before + rest, *lines[end_lineno:last]]
    body = lines[end_lineno:last]
    while body and not body[0].strip():  # the blank line that separated docstring and code
        body.pop(0)
    return [*lines[first - 1 : doc.lineno - 1], *body]
