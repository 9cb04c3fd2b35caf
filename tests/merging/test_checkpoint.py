"""Checkpoints read through their headers, and files that must not be trusted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_ext.merging import merge
from hf_ext.merging._checkpoint import Checkpoint
from tests.merging.models import equal, merged, random_models, save_model, save_shards, tensors_of


def header_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_any_order_and_alignment_of_tensors_is_read(tmp_path: Path) -> None:
    # b: bf16 [3, 5] comes first, so that a begins at an odd multiple of two; empty and 0-d tensors are legal.
    b = torch.arange(15).bfloat16().view(3, 5)
    a = torch.tensor([[1.5, -2.0], [3.0, 4.0]])
    header = {
        "b": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [30, 30]},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [30, 46]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [46, 50]},
    }
    data = bytes(b.view(torch.uint8).numpy().tobytes()) + a.numpy().tobytes() + struct.pack("<f", 7.0)
    (tmp_path / "m").mkdir()
    header_file(tmp_path / "m" / "model.safetensors", header, data)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), a)
    found = merged(tmp_path, "linear", [tmp_path / "m"])
    assert torch.equal(found["b"], b)
    assert torch.equal(found["a"], a)
    assert found["empty"].shape == (0, 7)
    assert found["scalar"].item() == 7.0


def test_shards_and_one_file_are_the_same_model(tmp_path: Path) -> None:
    (whole,) = random_models(tmp_path, 1)
    tensors = tensors_of(whole)
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]
    shards = save_shards(tmp_path / "shards", halves)
    assert equal(merged(tmp_path, "linear", [shards, whole]), tensors)


def test_the_output_is_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    large = {f"layer.{number}": torch.randn(150_000).bfloat16() for number in range(12)}
    save_model(model, large)
    merged(tmp_path, "linear", [model], options={"max_shard_size": "1MB"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12 * 300_000, "total_parameters": 12 * 150_000}
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) == 4
    assert equal(tensors_of(tmp_path / "out"), dict(sorted(large.items())))
    assert Checkpoint(tmp_path / "out").tensors.keys() == large.keys()


# Refusals -----------------------------------------------------------------------------------------


def refused(tmp_path: Path, model: Path, match: str, error: type[Exception] = ValueError) -> None:
    """Check that a merge with this model is refused and writes nothing."""
    good = random_models(tmp_path / "good", 1)[0]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        merge({"merge_method": "linear", "models": [str(good), str(model)]}, tmp_path / "out", progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, model, r"m0/model\.safetensors is damaged")


def test_a_pickle_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path, tmp_path / "m", r"pickle files \(pytorch_model\.bin\)")


def test_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere" / "at" / "all", "there is no such folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", "holds neither model.safetensors", FileNotFoundError)


@pytest.mark.parametrize(
    "target",
    ["../m0/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", 7, "x.bin"],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(target: Any, tmp_path: Path) -> None:
    random_models(tmp_path, 1)
    (tmp_path / "m").mkdir()
    index = {"weight_map": {"model.scale": target}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, tmp_path / "m", r"model\.scale points to .*which is no safetensors file of this folder")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to(model / "model.safetensors")
    refused(tmp_path, tmp_path / "m", "leads out of its folder")
    (tmp_path / "m" / "model.safetensors").unlink()
    save_model(tmp_path / "m", tensors_of(model))
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "config.json").symlink_to("/etc/hostname")
    refused(tmp_path, tmp_path / "m", "leads out of its folder")


def test_a_side_file_that_is_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    (model / "tokenizer.model").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"tokenizer\.model leads out of its folder"):
        merged(tmp_path, "linear", [model])
    assert not list(tmp_path.glob("*out*"))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    blobs = tmp_path / "models--o--m" / "blobs"
    snapshot = tmp_path / "models--o--m" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    digest = Checkpoint(model).digest(model / "model.safetensors")
    for name, blob in (("model.safetensors", digest), ("config.json", "c" * 40)):
        (model / name).rename(blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    checkpoint = Checkpoint(snapshot)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.digest(snapshot / "model.safetensors") == digest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "F8_E4M3"}, "has the type F8_E4M3, which cannot be merged; dequantize"),
        ({"shape": [2, 3]}, "has a damaged header: w is"),
        ({"shape": [-2, -2]}, "has a damaged header: w is"),
        ({"shape": "22"}, "has a damaged header: w is"),
        ({"data_offsets": [4, 20]}, "damaged"),
        ({"data_offsets": [0]}, "has a damaged header"),
    ],
)
def test_a_header_that_does_not_fit_its_data_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}
    header_file(tmp_path / "m" / "model.safetensors", {"w": entry}, bytes(16))
    refused(tmp_path, tmp_path / "m", match)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
    }
    header_file(tmp_path / "m" / "model.safetensors", header, bytes(20))
    refused(tmp_path, tmp_path / "m", "has a damaged header: b is")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    shards = save_shards(tmp_path / "m", [{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    index = shards / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"]["a"], held["weight_map"]["b"] = held["weight_map"]["b"], held["weight_map"]["a"]
    index.write_text(json.dumps(held))
    refused(tmp_path, shards, "and its shards disagree about: a, b")
    held["weight_map"]["b"] = "model-00003-of-00002.safetensors"
    index.write_text(json.dumps(held))
    refused(tmp_path, shards, r"model-00003-of-00002\.safetensors is missing", FileNotFoundError)


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_bus_error(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    checkpoint = Checkpoint(model)
    entry = checkpoint.tensors["lm_head.weight"]
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(entry.offset + 10)
    with pytest.raises(ValueError, match=r"model\.safetensors was cut short while it was read \(lm_head"):
        checkpoint.read(entry, 0, torch.empty(entry.numel, dtype=torch.bfloat16))
    checkpoint.close()
