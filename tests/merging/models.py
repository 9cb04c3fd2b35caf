"""Small checkpoints on the disk, and merges of them, for the tests of merging."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ext.merging import merge

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    """Write a model of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def save_shards(folder: Path, shards: Sequence[Mapping[str, Tensor]]) -> Path:
    """Write a model of several files with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(shard), folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def one_tensor(tmp_path: Path, *values: Any, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write one model for each list of values, its only tensor `w`."""
    return [
        save_model(tmp_path / f"m{number}", {"w": torch.tensor(value, dtype=dtype)})
        for number, value in enumerate(values)
    ]


SHAPES = {
    "model.embed_tokens.weight": (97, 64),
    "model.layers.0.mlp.up_proj.weight": (300, 130),
    "model.layers.0.norm.weight": (64,),
    "model.layers.1.mlp.up_proj.weight": (300, 130),
    "model.layers.1.norm.weight": (64,),
    "model.scale": (),
    "lm_head.weight": (97, 64),
    "rest": (0, 3),
}


def random_models(
    tmp_path: Path, count: int, *, dtype: torch.dtype = torch.bfloat16, change: float = 0.05, seed: int = 0
) -> list[Path]:
    """Write a base and `count - 1` models near it; the larger tensors have more than one block of 64 KiB."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    folders = [save_model(tmp_path / "m0", base)]
    for number in range(1, count):
        tuned = {
            name: (value.float() + change * torch.randn(value.shape, generator=generator)).to(dtype)
            for name, value in base.items()
        }
        folders.append(save_model(tmp_path / f"m{number}", tuned))
    return folders


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def merged(
    tmp_path: Path,
    method: str,
    models: Sequence[Path],
    base: Path | None = None,
    *,
    parents: Sequence[Mapping[str, Any]] | None = None,
    out: str = "out",
    options: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge and return the tensors of the result.

    Args:
        tmp_path: Where to write.
        method: The method.
        models: The parents.
        base: The base.
        parents: Settings of each parent.
        out: Name of the output.
        options: Further fields of the config.
        parameters: Settings of the method; `lambda_` is typed as lambda.
    """
    own = parents or [{}] * len(models)
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": dict(p)} for m, p in zip(models, own, strict=True)],
        "parameters": {name.rstrip("_"): value for name, value in parameters.items()},
        **(options or {}),
    }
    if base is not None:
        config["base_model"] = str(base)
    merge(config, tmp_path / out, progress=False, overwrite=True)
    return tensors_of(tmp_path / out)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types, shapes and bits."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and same_bits(a[name], b[name])
        for name in a
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return bytes(a.contiguous().view(-1).view(torch.uint8).numpy()) == bytes(
        b.contiguous().view(-1).view(torch.uint8).numpy()
    )
