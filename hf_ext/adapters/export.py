"""Export of low-rank adapters as ordinary PEFT LoRA folders, exact to rounding.

The update of such an adapter is a product of two factors that its own tensors give in closed form, so nothing
is decomposed to approximate it; a QR step removes directions that carry nothing. The folder loads with plain
PEFT, transformers' `load_adapter` and servers that read LoRA, in a process that never imports this package.
In a process group every rank must call it on a model (sharded tensors are gathered); the first one writes.
"""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..core import dist, registry
from ..core.checks import check
from ..core.files import atomic_folder, read_json, read_tensors, write_bytes, write_json, write_tensors
from ..core.lowrank import recompress
from ._base import AdapterConfig, AdapterLinear

__all__ = ["export_to_lora"]

_PREFIX = "base_model.model."
_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def export_to_lora(
    model_or_path: nn.Module | str | Path,
    out: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
) -> dict[str, float]:
    """Write an adapter as a PEFT LoRA checkpoint.

    Args:
        model_or_path: A model that carries the adapter (a PeftModel, or a transformers model after
            `add_adapter`), or the folder of a saved one. The base model is not needed for a folder.
        out: Folder to write; one that exists is replaced, and only once the new one is whole.
        adapter_name: Which adapter of a model.
        rank: Largest rank to keep in each layer, for a smaller and no longer exact export; None for exact.

    Returns:
        For each adapted module the share of the update's energy (squared Frobenius norm) that was dropped; 0
        without a `rank`.

    Raises:
        ValueError: The adapter's update has no low rank, or a file is damaged or incomplete.
        OSError: The folder cannot be written.
    """
    check(rank is None or rank >= 1, "rank", rank, "None or at least 1")
    _check_replaceable(Path(out))
    if isinstance(model_or_path, nn.Module):
        config, layers, others = _from_model(model_or_path, adapter_name)
    else:
        config, layers, others = _from_folder(Path(model_or_path))
    layer_class = cast(type[AdapterLinear], registry.get("adapter", config.method).target)

    tensors, ranks, dropped = dict(others), {}, {}
    for module, own in layers.items():
        _check_tensors(own, config.rank_of(module), module)
        try:
            pair = layer_class.factors(own, config.scale_of(module))
        except RuntimeError as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            raise ValueError(f"{module}: the adapter's tensors do not fit together: {shapes}") from error
        check(pair is not None, "adapter", config.method, "of a type whose update has low rank", where=module)
        b, a, dropped[module] = recompress(*cast(tuple[Tensor, Tensor], pair), rank=rank)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
        ranks[module] = a.shape[0]

    def write() -> None:
        with atomic_folder(out) as folder:
            write_tensors(folder / "adapter_model.safetensors", tensors)
            write_json(folder / "adapter_config.json", _lora_settings(config, ranks))
            write_bytes(folder / "README.md", _card(config).encode())

    if isinstance(model_or_path, nn.Module):
        dist.on_main(write)
    elif dist.is_main():
        write()
    return dropped


def _check_replaceable(out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    settings = out / "adapter_config.json"
    earlier = settings.is_file() and read_json(settings).get("peft_type") == "LORA"
    others = sorted(path.name for path in out.iterdir() if path.name not in _FILES)
    rule = "a new or empty folder, or an earlier export: everything in it would be replaced"
    check(earlier and not others, "out", str(out), rule)


def _check_tensors(tensors: Mapping[str, Tensor], r: int, module: str) -> None:
    for name, tensor in tensors.items():
        check(bool(tensor.isfinite().all()), name, "NaN or infinite values", "finite", where=module)
        check(r in tensor.shape, name, tuple(tensor.shape), f"of the config's rank {r}", where=module)


def _from_model(
    model: nn.Module, adapter_name: str
) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    config: AdapterConfig | None = None
    for path, module in model.named_modules():
        if isinstance(module, AdapterLinear) and adapter_name in module.configs:
            config = module.configs[adapter_name]
            layers[module.module_name] = {k: v.cpu() for k, v in module.adapter_tensors(adapter_name).items()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = {k: dist.full_tensor(v) for k, v in module.state_dict().items()}
            saved = cast(Any, module).adapter_state_dict(adapter_name, state)
            others.update({_PREFIX + path.removeprefix(_PREFIX) + f".{k}": v for k, v in saved.items()})
    check(
        config is not None,
        "adapter_name",
        adapter_name,
        "the name of an adapter of this package on the model",
    )
    config = copy.copy(cast(AdapterConfig, config))
    if config.task_type is None and config.auto_mapping is None:  # as PEFT does when it saves
        base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return config, layers, others


def _from_folder(folder: Path) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    path = folder / "adapter_config.json"
    check(path.is_file(), "adapter folder", str(folder), "a folder with an adapter_config.json")
    settings: dict[str, Any] = read_json(path)
    name = str(settings.get("peft_type", "")).lower()
    check(
        name != "lora", "peft_type", "LORA", "another type than LoRA, which needs no export", where=str(path)
    )
    config_class = cast(type[AdapterConfig], registry.get("adapter", name).config)
    config = cast(AdapterConfig, config_class.from_pretrained(str(folder)))
    layer_class = cast(type[AdapterLinear], registry.get("adapter", name).target)
    wanted = {*layer_class.adapter_layer_names, *layer_class.adapter_frozen_names}

    layers: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    others: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        module, _, attribute = key.rpartition(".")
        if attribute in wanted:
            layers[module.removeprefix(_PREFIX)][attribute] = tensor.float()
        else:
            others[key] = tensor
    check(
        bool(layers),
        "adapter_model.safetensors",
        sorted(others)[:3],
        f"one with {name} tensors",
        where=str(folder),
    )
    for module, own in layers.items():
        missing = sorted(wanted - set(own))
        check(
            not missing,
            "adapter_model.safetensors",
            f"no {', '.join(missing)} for {module}",
            "complete; an adapter saved with save_basis=False is exported from the loaded model instead",
            where=str(folder),
        )
    return config, dict(layers), others


def _lora_settings(config: AdapterConfig, ranks: Mapping[str, int]) -> dict[str, Any]:
    from peft import LoraConfig

    common = collections.Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(module): r for module, r in sorted(ranks.items()) if r != common}
    lora = LoraConfig(
        r=common,
        lora_alpha=common,  # the scale is in the factors
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        # The very modules, whatever rule chose them: exclusions and layer indices are settled by now.
        target_modules=sorted(ranks),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    settings = lora.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _card(config: AdapterConfig) -> str:
    base = config.base_model_name_or_path
    # A path of this machine means nothing to a reader, and the Hub refuses a card with one.
    is_id = base is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not Path(base).exists()
    named = f"base_model: {base}\n" if is_id else ""
    return (
        f"---\nlibrary_name: peft\n{named}tags:\n- lora\n- hf_ext\n---\n\n"
        f"# LoRA export of a {config.method} adapter\n\n"
        "An ordinary PEFT LoRA checkpoint with the same weight update. It loads without hf_ext:\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "<this folder or repository>")\n```\n'
    )
