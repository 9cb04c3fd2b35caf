"""Models by name: the Hub's cache, revisions, and what the card then says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from hf_ext.merging import merge
from tests.merging.models import CONFIG, save_model, tensors_of

MAIN, OTHER = "a" * 40, "b" * 40


def cached(cache: Path, name: str, commit: str, ref: str, value: float) -> None:
    """Put a snapshot into a Hub cache, its files linked to blobs as the client links them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    made = save_model(cache / "made", {"w": torch.full((3,), value)}, CONFIG)
    for file in ("model.safetensors", "config.json"):
        blob = f"{commit[0]}{file[0]}" * 20
        (made / file).rename(repository / "blobs" / blob)
        (repository / "snapshots" / commit / file).symlink_to(f"../../blobs/{blob}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a cache with two revisions of one model and one of another."""
    cache = tmp_path / "cache"
    cached(cache, "org/one", MAIN, "main", 1.0)
    cached(cache, "org/one", OTHER, "v2", 3.0)
    cached(cache, "org/two", "c" * 40, "main", 5.0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("org/one", 3.0),
        ("org/one@v2", 4.0),
        ({"model": "org/one", "revision": "v2"}, 4.0),
        (f"org/one@{OTHER}", 4.0),
    ],
)
def test_a_revision_is_honored(first: object, expected: float, hub: Path, tmp_path: Path) -> None:
    config = {"merge_method": "linear", "models": [first, "org/two"]}
    result = merge(config, tmp_path / "out", progress=False)
    assert tensors_of(tmp_path / "out")["w"].tolist() == [expected] * 3
    one, two = result.manifest["models"]
    assert (one["name"], one["revision"]) == ("org/one", MAIN if expected == 3.0 else OTHER)
    assert two["revision"] == "c" * 40


def test_the_card_has_the_lineage(hub: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "ties",
        "base_model": "org/one",
        "models": [{"model": "org/two", "parameters": {"weight": 0.5}}, "org/one@v2"],
        "parameters": {"density": 1.0},
    }
    merge(config, tmp_path / "out", progress=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["base_model"] == ["org/one", "org/two"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert "merge" in card.data.to_dict()["tags"]
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    for model in (manifest["base"], *manifest["models"]):
        assert model["revision"] in card.text
        assert model["sha256"]["model.safetensors"] in card.text


def test_a_folder_of_the_same_name_comes_first(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "org" / "one", {"w": torch.full((3,), 7.0)})
    monkeypatch.chdir(tmp_path)
    merge({"merge_method": "linear", "models": ["org/one"]}, "out", progress=False)
    assert tensors_of(tmp_path / "out")["w"].tolist() == [7.0] * 3
    config = {"merge_method": "linear", "models": [{"model": "org/one", "revision": "v2"}]}
    with pytest.raises(ValueError, match="revision must be left out for a folder, got 'v2'"):
        merge(config, "other", progress=False)
