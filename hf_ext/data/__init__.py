"""Data that needs no network: the source text and the docstrings of Python's own standard library."""

from hf_ext.data.stdlib import (
    COMPLETION_END,
    PROMPT_END,
    SPLITS,
    TASK_END,
    TASK_FORM,
    CorpusFile,
    DocstringPair,
    corpus_text,
    docstring_pairs,
    is_held_out,
    load_docstrings,
    split_of,
    stdlib_modules,
)

__all__ = [
    "COMPLETION_END",
    "PROMPT_END",
    "SPLITS",
    "TASK_END",
    "TASK_FORM",
    "CorpusFile",
    "DocstringPair",
    "corpus_text",
    "docstring_pairs",
    "is_held_out",
    "load_docstrings",
    "split_of",
    "stdlib_modules",
]
