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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from ..core import dist, registry
from ..core.checks import check, check_choice
from ..core.files import atomic_folder, read_json, read_tensors, write_bytes, write_json, write_tensors
from ..core.lowrank import recompress
from ._base import AdapterConfig, AdapterLinear
from ._injection import add_lora_option, tuner_of
from ._layouts import EmbeddingLayout, Layout
from ._lora import LoraStartConfig, LoraStartLayer

__all__ = ["export_to_lora"]

_PREFIX = "base_model.model."
# Factors B (out_features, r) and A (r, in_features) as a LoRA checkpoint has them.
_AsLora: TypeAlias = Callable[[Tensor, Tensor], dict[str, Tensor]]
_Source: TypeAlias = tuple[
    AdapterConfig | LoraStartConfig, dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, _AsLora]
]
_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def export_to_lora(
    model_or_path: nn.Module | str | Path,
    out: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    against: str = "base",
) -> dict[str, float]:
    """Write an adapter as a PEFT LoRA checkpoint.

    Args:
        model_or_path: A model that carries the adapter (a PeftModel, or a transformers model after
            `add_adapter`), or the folder of a saved one. The base model is not needed for a folder.
        out: Folder to write; one that exists is replaced, and only once the new one is whole.
        adapter_name: Which adapter of a model.
        rank: Largest rank to keep in each layer, for a smaller and no longer exact export; None for exact.
        against: What the LoRA is to be loaded on: "base", the model that was adapted, or "quantized_base",
            the quantized residual that QPiSSA has put in its place.

    Returns:
        For each adapted module the share of the update's energy (squared Frobenius norm) that was dropped; 0
        without a `rank`.

    Raises:
        ValueError: The adapter's update has no low rank, or is not of what `against` names, or a layer is of
            a kind that PEFT's LoRA has not, or a file is damaged or incomplete.
        OSError: The folder cannot be written.
    """
    check(rank is None or rank >= 1, "rank", rank, "None or at least 1")
    check_choice("against", against, ("base", "quantized_base"))
    _check_replaceable(Path(out))
    if isinstance(model_or_path, nn.Module):
        config, layers, others, forms = _from_model(model_or_path, adapter_name)
    else:
        config, layers, others, forms = _from_folder(Path(model_or_path))
    is_lora = isinstance(config, LoraStartConfig)
    if is_lora and rank is None and against == "base":  # it is one already
        tensors = {**others, **{key: value for own in layers.values() for key, value in own.items()}}
        settings, dropped = _settings(_inference(config.plain_lora())), dict.fromkeys(layers, 0.0)
    else:
        tensors, ranks, dropped = _factored(config, layers, others, forms, rank, against)
        settings = _lora_settings(config, ranks)
        if not any(key.endswith(".bias") for key in others):  # those of old BONE checkpoints
            settings["bias"] = "none"

    def write() -> None:
        with atomic_folder(out) as folder:
            write_tensors(folder / "adapter_model.safetensors", tensors)
            write_json(folder / "adapter_config.json", settings)
            write_bytes(folder / "README.md", _card(config).encode())

    if isinstance(model_or_path, nn.Module):
        dist.on_main(write)
    elif dist.is_main():
        write()
    return dropped


def _factored(
    config: Any,
    layers: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    forms: Mapping[str, _AsLora],
    rank: int | None,
    against: str,
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """Return the LoRA tensors, the rank of each module, and the share of energy dropped from each."""
    layer_class = cast(Any, registry.get("adapter", config.type_name).target)
    kind = "quantized_base_factors" if against == "quantized_base" else "module_factors"
    rule = f"'base' for an adapter of type {config.type_name}"
    check(hasattr(layer_class, kind), "against", against, rule)
    tensors, ranks, dropped = dict(others), {}, {}
    for module, whole in layers.items():
        # A LoRA's tensors come with the keys of its checkpoint.
        own = {key.removesuffix(".weight").rpartition(".")[2]: value for key, value in whole.items()}
        _check_finite(own, module)
        try:
            pair = getattr(layer_class, kind)(own, config, module)
        except RuntimeError as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            raise ValueError(f"{module}: the adapter's tensors do not fit together: {shapes}") from error
        check(
            pair is not None, "adapter", config.type_name, "of a type whose update has low rank", where=module
        )
        b, a, dropped[module] = recompress(*cast(tuple[Tensor, Tensor], pair), rank=rank)
        try:
            named = forms.get(module, Layout.as_lora)(b, a)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        tensors.update({f"{_PREFIX}{module}.{key}": value.contiguous() for key, value in named.items()})
        ranks[module] = a.shape[0]
    return tensors, ranks, dropped


def _is_ours(peft_type: str) -> bool:
    return peft_type.lower() in registry.names("adapter")


add_lora_option(export_to_lora, _is_ours)


def _check_replaceable(out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    settings = out / "adapter_config.json"
    earlier = settings.is_file() and read_json(settings).get("peft_type") == "LORA"
    others = sorted(path.name for path in out.iterdir() if path.name not in _FILES)
    rule = "a new or empty folder, or an earlier export: everything in it would be replaced"
    check(earlier and not others, "out", str(out), rule)


def _check_finite(tensors: Mapping[str, Tensor], module: str) -> None:
    for name, tensor in tensors.items():
        check(bool(tensor.isfinite().all()), name, "NaN or infinite values", "finite", where=module)


def _check_shapes(tensors: dict[str, Tensor], layer_class: Any, config: Any, module: str) -> bool:
    """Check the shapes of one layer's tensors; bring those of an embedding into the form of a linear layer's.

    Returns:
        Whether they were an embedding's.
    """
    r, kinds = config.rank_of(module), layer_class.kinds
    for name, tensor in tensors.items():
        rule = "one of no convolution, whose LoRA takes what a folder does not hold: export the loaded model"
        is_filter = "convolution" in kinds and tensor.dim() > 2
        check(not is_filter, name, tuple(tensor.shape), rule, where=module)
    # A folder does not tell a layer's sizes; negative ones stand for them, and fit any.
    wanted = layer_class.shapes(SimpleNamespace(in_features=-1, out_features=-2), r, config)

    def misfit(given: Mapping[str, Tensor]) -> str | None:
        for name, tensor in given.items():
            sizes = wanted[name]
            if tensor.dim() != len(sizes):
                return name
            if any(0 <= want != size for want, size in zip(sizes, tensor.shape, strict=True)):
                return name
        return None

    turned = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    wrong = misfit(tensors)
    is_embedding = wrong is not None and "embedding" in kinds and misfit(turned) is None
    if wrong is not None and not is_embedding:
        check(False, wrong, tuple(tensors[wrong].shape), f"of the config's rank {r}", where=module)
    if is_embedding:
        tensors.update(turned)
    return is_embedding


def _from_model(model: nn.Module, adapter_name: str) -> _Source:
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    forms: dict[str, _AsLora] = {}
    config: Any = None
    for path, module in model.named_modules():
        if isinstance(module, AdapterLinear) and adapter_name in module.configs:
            config = module.configs[adapter_name]
            layers[module.module_name] = {k: v.cpu() for k, v in module.adapter_tensors(adapter_name).items()}
            forms[module.module_name] = module.layout.as_lora
        elif isinstance(module, LoraStartLayer) and adapter_name in module.configs:
            config = module.configs[adapter_name]
            inner = path.removeprefix(_PREFIX)  # wrappers of one module's parameters are nested
            layers[inner] = {
                f"{_PREFIX}{inner}.{k}": v.cpu() for k, v in module.checkpoint_tensors(adapter_name).items()
            }
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
    if config.bias != "none":
        others.update(_biases(model, config, adapter_name))
    config = copy.copy(config)
    if config.task_type is None and config.auto_mapping is None:  # as PEFT does when it saves
        base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return config, layers, others, forms


def _biases(
    model: nn.Module, config: AdapterConfig | LoraStartConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Return the biases of the base that are trained with an adapter, as its checkpoint names them."""
    tuner = tuner_of(config)
    if isinstance(config, AdapterConfig):
        found = tuner._get_learnable_bias_state_dict(model, model.state_dict(), config)
        return {
            _PREFIX + k.removeprefix(_PREFIX): dist.full_tensor(v).detach().cpu() for k, v in found.items()
        }
    unwanted = [name for name in cast(Any, model).peft_config if name != adapter_name]
    state = tuner._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), unwanted)
    return {
        _PREFIX + key.removeprefix(_PREFIX): dist.full_tensor(value.detach()).cpu()
        for key, value in state.items()
        if not any(part in key for part in (".lora_", ".modules_to_save.", ".original_module."))
    }


def _from_folder(
    folder: Path,
) -> _Source:
    path = folder / "adapter_config.json"
    check(path.is_file(), "adapter folder", str(folder), "a folder with an adapter_config.json")
    settings: dict[str, Any] = read_json(path)
    name = str(settings.get("peft_type", "")).lower()
    check(
        name != "lora", "peft_type", "LORA", "another type than LoRA, which needs no export", where=str(path)
    )
    config = cast(Any, registry.get("adapter", name).config).from_pretrained(str(folder))
    layer_class = cast(Any, registry.get("adapter", name).target)
    if isinstance(config, LoraStartConfig):
        loras, others = _lora_tensors(read_tensors(folder / "adapter_model.safetensors"))
        for module, own in loras.items():
            r = config.rank_of(module)
            for key, tensor in own.items():
                check(r in tensor.shape, key, tuple(tensor.shape), f"of the config's rank {r}")
        return config, loras, others, {}
    wanted = {*layer_class.adapter_layer_names, *layer_class.adapter_frozen_names}

    layers: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    others: dict[str, Tensor] = {}
    forms: dict[str, _AsLora] = {}
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
    kept_by = getattr(layer_class, "kept_by", None)
    rule = "complete"
    if kept_by is not None:
        rule += f"; an adapter saved with {kept_by}=False is exported from the loaded model instead"
    for module, own in layers.items():
        missing = sorted(wanted - set(own))
        given = f"no {', '.join(missing)} for {module}"
        check(not missing, "adapter_model.safetensors", given, rule, where=str(folder))
        if _check_shapes(own, layer_class, config, module):
            forms[module] = EmbeddingLayout.as_lora
        # PEFT saves the base beside an adapted embedding or head: without what was taken out of it.
        if getattr(config, "base_mode", "") == "residual":
            others.pop(f"{_PREFIX}{module}.base_layer.weight", None)
    return config, dict(layers), others, forms


def _lora_tensors(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, marked, _ = key.partition(".lora_")
        if marked:
            layers[module.removeprefix(_PREFIX)][key] = tensor
        else:
            others[key] = tensor
    return dict(layers), others


def _lora_settings(config: Any, ranks: Mapping[str, int]) -> dict[str, Any]:
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
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    return _settings(lora)


def _inference(config: Any) -> Any:
    config.inference_mode = True
    return config


def _settings(lora: Any) -> dict[str, Any]:
    settings = lora.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _card(config: Any) -> str:
    base = config.base_model_name_or_path
    # A path of this machine means nothing to a reader, and the Hub refuses a card with one.
    is_id = base is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not Path(base).exists()
    named = f"base_model: {base}\n" if is_id else ""
    return (
        f"---\nlibrary_name: peft\n{named}tags:\n- lora\n- hf_ext\n---\n\n"
        f"# LoRA export of a {config.type_name} adapter\n\n"
        "An ordinary PEFT LoRA checkpoint with the same weight update. It loads without hf_ext:\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "<this folder or repository>")\n```\n'
    )
