"""Checkpoints of PEFT's BONE type (0.14 to 0.18): their form, and their conversion to MiSS and to LoRA.

`adapter_config.json` has r, init_weights (true, false or "bat") and bias, but no form; the weight file has
one tensor `base_model.model.<module>.bone_block` for each layer, (r, out_features) for plain and
(out_features / r, r, r) for bat. Releases write "bat" for the latter, the method's first commit wrote true:
the tensors decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._compat.peft import get_pattern_key, in_out_features
from ..core.checks import check, check_choice
from ..core.files import atomic_folder, read_json, read_tensors, write_json, write_tensors

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT's configs share, and mean the same by.
_COMMON = (
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
)


def tiled_delta(block: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return delta W (out_features, in_features) of the plain and mini forms, for D (r, width)."""
    r, width = block.shape
    return block.T.repeat(out_features // width, math.ceil(in_features / r))[:, :in_features]


def block_factors(block: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Return factors B (out_features, k) and A (k, in_features) of `tiled_delta`, with k = min(r, width).

    One is the block, repeated; the other has zeros and ones only, so that B A has the block's very values.
    """
    r, width = block.shape
    if width < r:
        tile = torch.eye(width, dtype=block.dtype, device=block.device)
        return tile.repeat(out_features // width, 1), tiled_delta(block, width, in_features)
    slices = tiled_delta(torch.eye(r, dtype=block.dtype, device=block.device), r, in_features)
    return block.T.repeat(out_features // width, 1), slices


def blocks_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's blocks by module path; `tensors` are as in its weight file."""
    blocks = {
        key.rpartition(".")[0]: t for key, t in tensors.items() if key.rpartition(".")[2] == "bone_block"
    }
    return {path.removeprefix(_PREFIX): tensor for path, tensor in blocks.items()}


def form_of_checkpoint(tensors: Mapping[str, Tensor], said: str) -> str:
    """Return the form of a checkpoint's blocks: bat where they have three dimensions, else what was said.

    Args:
        tensors: As in the weight file.
        said: The config's form; "plain" takes the place of "bat" for blocks of two dimensions.

    Raises:
        ValueError: The blocks have other numbers of dimensions, or not all the same.
    """
    blocks = blocks_of(tensors)
    dims = {tensor.ndim for tensor in blocks.values()}
    for path, tensor in sorted(blocks.items()):
        rule = "of two dimensions (plain, mini) or three (bat), the same for all layers"
        check(len(dims) == 1 and dims <= {2, 3}, f"{path}.bone_block", tuple(tensor.shape), rule)
    if dims == {3}:
        return "bat"
    return "plain" if dims and said == "bat" else said


def convert_bone_checkpoint(
    src: str | Path, dst: str | Path, to: str = "miss", *, base_model: nn.Module | None = None
) -> None:
    """Write a BONE checkpoint, an old one of PEFT's or one of this package, as one that PEFT loads by itself.

    Args:
        src: Folder with adapter_config.json and adapter_model.safetensors (or .bin, which PEFT reads without
            unpickling objects).
        dst: Folder to write, new or empty; it appears only when it is whole.
        to: "miss" for PEFT's MiSS, the same adapter under its newer name; "lora" for a LoRA with the same
            update, exact to the last bit of the adapter (plain and mini forms only).
        base_model: The model that was adapted, for "lora": the input sizes of its layers are in no old file.
            It may be on the meta device. None where the config has them, as this package's have.

    Raises:
        ValueError: The source is damaged or contradicts itself, has a setting that the target lacks, is of
            the bat form for "lora", or `dst` has something in it.
        OSError: The folder cannot be written.
    """
    check_choice("to", to, ("miss", "lora"))
    src, dst = Path(src), Path(dst)
    check(
        not dst.exists() or (dst.is_dir() and not any(dst.iterdir())),
        "dst",
        str(dst),
        "a new or empty folder",
    )
    check((src / _CONFIG).is_file(), "src", str(src), f"a folder with an {_CONFIG}")
    old: dict[str, Any] = read_json(src / _CONFIG)
    check(
        old.get("peft_type") == "BONE", "peft_type", old.get("peft_type"), "'BONE'", where=str(src / _CONFIG)
    )
    tensors = _read(src)
    blocks = blocks_of(tensors)
    check(bool(blocks), _WEIGHTS, sorted(tensors)[:3], "one with bone_block tensors", where=str(src))
    form = form_of_checkpoint(tensors, _said_form(old))
    _check_blocks(blocks, form, old)
    others = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] != "bone_block"}
    config = {name: old[name] for name in _COMMON if name in old}
    if to == "miss":
        written = _to_miss(blocks, form, old, config)
    else:
        written = _to_lora(blocks, form, old, config, base_model)
        bias = str(old.get("bias", "none"))  # old files say so, and have none
        has_biases = any(key.endswith(".bias") for key in others)
        config["bias"] = "none" if not has_biases else "all" if bias == "all" else "lora_only"
    with atomic_folder(dst) as folder:
        write_tensors(folder / _WEIGHTS, {**others, **written})
        write_json(folder / _CONFIG, config)


def _read(src: Path) -> dict[str, Tensor]:
    if (src / _WEIGHTS).is_file():
        return read_tensors(src / _WEIGHTS)
    check((src / "adapter_model.bin").is_file(), "src", str(src), f"a folder with an {_WEIGHTS}")
    from peft import load_peft_weights

    return load_peft_weights(str(src), device="cpu")


def _said_form(old: Mapping[str, Any]) -> str:
    said = old.get("init_weights", True)
    return said if isinstance(said, str) else str(old.get("form", "plain"))


def _check_blocks(blocks: Mapping[str, Tensor], form: str, old: Mapping[str, Any]) -> None:
    pattern = old.get("rank_pattern") or {}
    for path, block in blocks.items():
        name = f"{path}.bone_block"
        r = pattern.get(get_pattern_key(list(pattern), path), old.get("r", 64))
        width = {"mini": old.get("mini_r", 1), "bat": r}.get(form, block.shape[-1])
        fits = block.shape[-2:] == (r, width)
        check(fits, name, tuple(block.shape), f"of the config's r {r} and of the {form} form", where=_CONFIG)
        check(bool(block.isfinite().all()), name, "NaN or infinite values", "finite")


def _to_miss(
    blocks: Mapping[str, Tensor], form: str, old: Mapping[str, Any], config: dict[str, Any]
) -> dict[str, Tensor]:
    pattern = old.get("rank_pattern") or {}
    check(not pattern, "rank_pattern", pattern, "empty: MiSS has one r for all layers")
    bias = str(old.get("bias", "none"))
    config.update(
        peft_type="MISS",
        r=old.get("r", 64),
        mini_r=old.get("mini_r", 1),
        miss_dropout=old.get("dropout", 0.0),
        init_weights=True if form == "plain" else form,
        bias="MiSS_only" if bias.lower() == "bone_only" else bias,
    )
    return {f"{_PREFIX}{path}.miss_block": block for path, block in blocks.items()}


def _to_lora(
    blocks: Mapping[str, Tensor],
    form: str,
    old: Mapping[str, Any],
    config: dict[str, Any],
    base_model: nn.Module | None,
) -> dict[str, Tensor]:
    check(form != "bat", "to", "lora", "'miss' for the bat form, whose update has full rank")
    shapes: Mapping[str, Any] = old.get("layer_shapes") or {}
    tensors, ranks = {}, {}
    for path, block in sorted(blocks.items()):
        shape = _layer_shape(base_model, path) if base_model is not None else shapes.get(path)
        check(shape is not None, "base_model", base_model, "given: no file has its layers' sizes", where=path)
        rows, columns = shape  # pyright: ignore[reportGeneralTypeIssues]
        fits = rows == block.shape[1] if form == "plain" else rows % block.shape[1] == 0
        check(fits, f"{path}.bone_block", tuple(block.shape), f"one of a layer with {rows} out_features")
        b, a = block_factors(block, rows, columns)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b
        ranks[path] = a.shape[0]
    common = next(iter(ranks.values()))
    pattern = {re.escape(path): r for path, r in ranks.items() if r != common}
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        config.pop(name, None)  # settled: the very modules are named
    config.update(
        peft_type="LORA",
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
    )
    return tensors


def _layer_shape(model: nn.Module, path: str) -> tuple[int, int]:
    try:
        sizes = in_out_features(model.get_submodule(path))
    except AttributeError:
        sizes = (None, None)
    check(sizes[0] is not None, "base_model", type(model).__name__, f"a model with a linear layer {path}")
    return cast(tuple[int, int], sizes[::-1])
