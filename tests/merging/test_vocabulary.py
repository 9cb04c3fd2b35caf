"""Models of different vocabularies, whose embeddings and heads are matched token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ext.merging import merge
from tests.merging.models import equal, save_model, tensors_of
from tests.merging.test_partial import Interrupted, interrupt_after

pytestmark = pytest.mark.filterwarnings("ignore:.* lacks .* of the .* tokens")
WEIGHTS = (1.0, 0.5, 0.25)  # of the models in order
WORDS = [f"w{number}" for number in range(40)]
# Words of b stand in another order, c lacks a run of them, and only d has the last ones.
VOCABULARIES = {
    "a": WORDS[:32],
    "b": WORDS[4:36][::-1],
    "c": WORDS[:10] + WORDS[20:40],
    "d": [*WORDS[:32], "x", "y"],
}


def give_words(model: Path, words: Sequence[str]) -> None:
    tokens = {word: number for number, word in enumerate(words)}
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))


def rows_of(count: int, width: int, seed: int) -> Tensor:
    places = torch.arange(count * width, dtype=torch.float64)
    return torch.sin(places * (1.3 + 0.7 * seed) + 3.1 * seed).view(count, width).float()


def write(
    folder: Path,
    words: Sequence[str],
    seed: int,
    *,
    width: int = 16,
    padding: int = 0,
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model with an embedding and a head of its own words, and a layer."""
    rows = len(words) + padding
    tensors = {
        "model.embed_tokens.weight": rows_of(rows, width, seed),
        "model.layers.0.w": rows_of(3, width, seed + 10),
        "lm_head.weight": rows_of(rows, width, seed + 20),
        **(more or {}),
    }
    config = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 1, "vocab_size": rows}
    save_model(folder, tensors, config)
    give_words(folder, words)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        name: write(tmp_path / name, words, seed) for seed, (name, words) in enumerate(VOCABULARIES.items())
    }


def recipe(
    models: Mapping[str, Path], names: str, source: str, method: str = "linear", **more: Any
) -> dict[str, Any]:
    named = [
        {"model": str(models[name]), "parameters": {"weight": weight}}
        for name, weight in zip(names, WEIGHTS[: len(names)], strict=True)
    ]
    source = source if source in ("base", "union") else str(models[source])
    return {"merge_method": method, "models": named, "tokenizer_source": source, **more}


# The plain twin -----------------------------------------------------------------------------------


def matched(
    models: Mapping[str, Path], names: Sequence[str], source: str, base: str | None, key: str
) -> dict[str, Tensor]:
    """Return each model's tensor with the rows of the source's words, found word by word."""
    read = {name: tensors_of(models[name])[key] for name in names}
    has = {name: {w: read[name][i] for i, w in enumerate(VOCABULARIES[name])} for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for word in VOCABULARIES[source]:
        owners = [name for name in names if word in has[name]]
        if len(owners) == 1:
            default = has[owners[0]][word]
        elif base in owners:
            default = has[base][word]
        else:
            default = sum((has[name][word] for name in owners), torch.zeros(())) / len(owners)
        for name in names:
            found[name].append(has[name].get(word, default))
    return {name: torch.stack(rows) for name, rows in found.items()}


KEYS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("names", "source"), [("abc", "a"), ("abc", "b"), ("bca", "c"), ("ab", "b"), ("cd", "d")]
)
def test_linear_merges_words_with_words(
    names: str, source: str, models: dict[str, Path], tmp_path: Path
) -> None:
    merge(recipe(models, names, source), tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    weights = dict(zip(names, WEIGHTS[: len(names)], strict=True))
    for key in KEYS:
        parts = matched(models, names, source, None, key)
        total = sum((weights[name] * part for name, part in parts.items()), torch.zeros(()))
        torch.testing.assert_close(found[key], total / sum(weights.values()), rtol=0.0, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(VOCABULARIES[source])
    written = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert written == (models[source] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("source", ["base", "c"])
def test_task_vectors_are_taken_between_rows_of_one_word(
    source: str, models: dict[str, Path], tmp_path: Path
) -> None:
    content = recipe(models, "bc", source, "task_arithmetic", base_model=str(models["a"]))
    with pytest.warns(
        UserWarning, match="b lacks 4 of the 32" if source == "base" else "b lacks 8 of the 30"
    ):
        merge(content, tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    for key in KEYS:
        parts = matched(models, "abc", source.replace("base", "a"), "a", key)
        wanted = parts["a"] + 1.0 * (parts["b"] - parts["a"]) + 0.5 * (parts["c"] - parts["a"])
        torch.testing.assert_close(found[key], wanted, rtol=0.0, atol=1e-6)


# What mergekit 0.1.5 gives for these: the sum of the elements times cos(1.7 n), of embeddings and head.
MERGEKIT: dict[tuple[str, str], list[float]] = {
    ("linear", "base"): [-1.031999, -0.27878],
    ("linear", "b"): [3.596834, -0.144926],
    ("linear", "c"): [-1.079882, -0.116569],
    ("task_arithmetic", "base"): [2.433571, 1.024732],
    ("task_arithmetic", "c"): [2.131843, -1.119723],
}


@pytest.mark.parametrize("case", MERGEKIT)
def test_mergekit_gives_the_same(case: tuple[str, str], models: dict[str, Path], tmp_path: Path) -> None:
    method, source = case
    base = {"base_model": str(models["a"])} if source == "base" or method != "linear" else {}
    names = "bc" if method == "task_arithmetic" else "abc"
    merge(recipe(models, names, source, method, **base), tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    assert [share(found[key]) for key in KEYS] == pytest.approx(MERGEKIT[case], rel=0.0, abs=1e-5)


def share(values: Tensor) -> float:
    flat = values.double().view(-1)
    return float((flat * torch.cos(1.7 * torch.arange(flat.numel(), dtype=torch.float64))).sum())


# How they are read --------------------------------------------------------------------------------


def test_bits_do_not_depend_on_blocks_that_cut_rows_or_on_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {n: write(tmp_path / n, VOCABULARIES[n], seed, width=3001) for seed, n in enumerate("abc")}
    content = recipe(models, "abc", "b", "ties", base_model=str(models["a"]), block_bytes=65536)
    content["parameters"] = {"density": 0.4}
    merge({**content, "block_bytes": 1 << 26, "threads": 1}, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            merge({**content, "threads": 1}, tmp_path / "out", progress=False)
    give_words(models["c"], [*VOCABULARIES["c"][:5], "other", *VOCABULARIES["c"][6:]])
    with pytest.raises(ValueError, match="holds an unfinished merge of another plan"):
        merge(content, tmp_path / "out", progress=False)
    give_words(models["c"], VOCABULARIES["c"])
    assert merge(content, tmp_path / "out", progress=False).resumed
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_padding_is_that_of_the_source(tmp_path: Path) -> None:
    models = {
        "a": write(tmp_path / "a", VOCABULARIES["a"], 0, padding=4),
        "b": write(tmp_path / "b", VOCABULARIES["b"], 1, padding=9),
    }
    merge(recipe(models, "ab", "a"), tmp_path / "out", progress=False)
    for key in KEYS:
        found, own = tensors_of(tmp_path / "out")[key], tensors_of(models["a"])[key]
        assert torch.equal(found[32:], own[32:])
        assert found.shape == own.shape
    # Vocabularies that are equal, of embeddings that are not padded alike.
    give_words(models["b"], VOCABULARIES["a"])
    merge(recipe(models, "ab", "b"), tmp_path / "more", progress=False)
    a, b = (tensors_of(models[name])[KEYS[0]] for name in "ab")
    found = tensors_of(tmp_path / "more")[KEYS[0]]
    torch.testing.assert_close(found[:32], (a[:32] + 0.5 * b[:32]) / 1.5)
    assert torch.equal(found[32:], b[32:])


def test_biases_of_heads_are_matched_and_excluded_tensors_are_the_references(tmp_path: Path) -> None:
    models = {
        name: write(
            tmp_path / name, VOCABULARIES[name], seed, more={"lm_head.bias": rows_of(32, 1, seed).view(-1)}
        )
        for seed, name in enumerate("ab")
    }
    merge(recipe(models, "ab", "b", exclude=["*embed_tokens*"]), tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    for key, weight in (("lm_head.bias", 0.5), ("model.embed_tokens.weight", 0.0)):
        parts = matched(models, "ab", "b", None, key)
        torch.testing.assert_close(found[key], (parts["a"] + weight * parts["b"]) / (1.0 + weight))


@pytest.mark.parametrize(
    "keys",
    [
        ("shared.weight", "lm_head.weight"),  # T5
        ("model.tok_embeddings.weight", "output.weight"),  # InternLM
        ("backbone.embeddings.weight",),  # Mamba
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias"),
        ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"),  # Gemma 3n
    ],
)
def test_families_with_other_names(keys: tuple[str, ...], tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in "ab"}
    for seed, (name, folder) in enumerate(models.items()):
        rows = {key: rows_of(32, 8, seed + 3 * place) for place, key in enumerate(keys)}
        rows = {key: value[:, 0].clone() if key.endswith("bias") else value for key, value in rows.items()}
        # Sizes that are the vocabulary's by chance, in places where tokens have no rows.
        more = {"model.layers.0.q_proj.weight": rows_of(32, 32, seed), "model.norm.weight": torch.ones(32)}
        save_model(folder, {**rows, **more}, {"model_type": "llama", "vocab_size": 32})
        give_words(folder, VOCABULARIES[name])
    merge(recipe(models, "ab", "b"), tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    for key in keys:
        parts = matched(models, "ab", "b", None, key)
        torch.testing.assert_close(found[key], (parts["a"] + 0.5 * parts["b"]) / 1.5)
    layers = [tensors_of(models[name])["model.layers.0.q_proj.weight"] for name in "ab"]
    torch.testing.assert_close(found["model.layers.0.q_proj.weight"], (layers[0] + 0.5 * layers[1]) / 1.5)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("plain", ["vocab.json", "vocab.txt"])
def test_added_tokens_of_tokenizers_without_a_tokenizer_json(where: str, plain: str, tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in "ab"}
    for seed, (name, folder) in enumerate(models.items()):
        words, added = VOCABULARIES[name][:-2], dict(zip(VOCABULARIES[name][-2:], (30, 31), strict=True))
        write(folder, VOCABULARIES[name], seed)
        (folder / "tokenizer.json").unlink()
        tokens = {word: number for number, word in enumerate(words)}
        text = json.dumps(tokens) if plain == "vocab.json" else "\n".join(words)
        (folder / plain).write_text(text, encoding="utf-8")
        items = {str(number): {"content": word} for word, number in added.items()}
        content = added if where == "added_tokens.json" else {"added_tokens_decoder": items}
        (folder / where).write_text(json.dumps(content))
    merge(recipe(models, "ab", "b"), tmp_path / "out", progress=False)
    parts = matched(models, "ab", "b", None, KEYS[0])
    found = tensors_of(tmp_path / "out")[KEYS[0]]
    torch.testing.assert_close(found, (parts["a"] + 0.5 * parts["b"]) / 1.5)
    assert str(tmp_path) not in (tmp_path / "out" / "merge_manifest.json").read_text()


def test_slices_are_matched_too(models: dict[str, Path], tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(models[name]), "layer_range": [0, 1]}]} for name in "ab"]
    content = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": str(models["b"])}
    merge(content, tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[KEYS[0]], matched(models, "ab", "b", None, KEYS[0])["a"])
    assert torch.equal(found[KEYS[1]], tensors_of(models["b"])[KEYS[1]])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 32)


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_matched_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            merge({**recipe(models, "ab", "b"), **changes}, tmp_path / "out", progress=False)
        assert not list(tmp_path.glob("*out*"))

    hint = r"vocabularies of a and b differ in 36 tokens.*\(tokenizer_source: base, or one of the models"
    refused(hint, tokenizer_source=None)
    refused(hint, tokenizer_source="union")
    refused("tokenizer_source must be 'base' or one of the models", tokenizer_source=str(models["c"]))
    write(models["b"], VOCABULARIES["b"], 1, width=8)
    refused(r"model\.embed_tokens\.weight \[32, 8\] instead of \[32, 16\]")
    write(models["b"], VOCABULARIES["b"], 1, more={"lm_head.weight": rows_of(33, 16, 1)})
    refused(r"tokens cannot be matched where embedding and head have unlike rows: b")
    write(models["b"], VOCABULARIES["b"], 1)
    write(models["a"], VOCABULARIES["d"], 0)
    (models["a"] / "tokenizer.json").unlink()
    refused("tokens cannot be matched without a tokenizer, which is not in a")
    write(models["a"], VOCABULARIES["a"], 0)  # as many rows as b: they would be mixed unlike
    (models["a"] / "tokenizer.json").unlink()
    refused("tokens cannot be matched without a tokenizer, which is not in a")
    for name in "ab":  # of the same number of rows, so that nothing else would notice
        write(models[name], VOCABULARIES[name], 1, more={"final_logits_bias": rows_of(1, 32, 1)})
    refused("tokens cannot be matched: whether final_logits_bias has a row for each token is not known")
    for name in "ab":
        save_model(models[name], {"model.table": rows_of(32, 16, 1)}, {"model_type": "llama"})
        give_words(models[name], VOCABULARIES[name])
    refused("tokens cannot be matched: no embedding is known in b")
