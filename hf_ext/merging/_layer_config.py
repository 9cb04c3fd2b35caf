"""The config of a model whose layers come from elsewhere: their number, and what it says layer by layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..core.checks import check
from ._checkpoint import Checkpoint

Sources: TypeAlias = Sequence[Sequence[tuple[Checkpoint, int]]]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists of layer numbers.
_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_layers"),
    "hybrid_layer_ids",
)
# Lists with as many items as a model may have layers, of something else.
_OTHER_LISTS = (
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "mrope_section",
    "rope_scaling",
)
_OF_LAYERS = (
    "num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_query_heads", "intermediate_size",
    "ffn_multipliers", "activation_sparsity_pattern", "moe_layer_freq",
)  # fmt: skip
# What kind of layer a number makes of the layer at a place, where no list says so.
_PATTERNS: dict[str, Callable[[dict[str, Any], int, int], object]] = {
    "decoder_sparse_step": lambda config, step, place: (place + 1) % step == 0,
    "interleave_moe_layer_step": lambda config, step, place: (place + 1) % step == 0,
    "first_k_dense_replace": lambda config, first, place: place < first,
    "moe_layer_freq": lambda config, step, place: place % step == 0,
    "num_kv_shared_layers": lambda config, shared, place: place < (_count(config) or 0) - shared,
    "attn_layer_period": lambda config, n, place: place % n == config.get("attn_layer_offset", 0),
    "expert_layer_period": lambda config, n, place: place % n == config.get("expert_layer_offset", 0),
    # Those of attention count only where layer_types is not there.
    "sliding_window_pattern": lambda config, step, place: (place + 1) % step == 0,
    "full_attention_interval": lambda config, step, place: (place + 1) % step == 0,
    "no_rope_layer_interval": lambda config, step, place: (place + 1) % step == 0,
    "max_window_layers": lambda config, first, place: (
        place >= first if config.get("use_sliding_window") else None
    ),
}
_OF_ATTENTION = frozenset(
    ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval", "max_window_layers")
)


def stated_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a config states, or None."""
    return _count(_section(config))


def layered_config(reference: Checkpoint, held: int, sources: Sources) -> dict[str, Any] | None:
    """Return the reference's config for other layers, or None where its layers stay as they are.

    Args:
        reference: The model that the output is like.
        held: How many layers it has.
        sources: For each layer of the output, the models and layers that it is made of.

    Raises:
        ValueError: The config cannot say what the layers are; the text names the field.
    """
    if not reference.config:
        return None
    count = stated_layers(reference.config)
    own = _section(reference.config)
    whole = [[(model, number) for model, _ in sources[0]] for number in range(held)]
    if [list(layer) for layer in sources] == whole:
        return None
    where = f"config.json of {reference.label}"
    check(count is not None, "num_hidden_layers", None, "given, to be changed", where=where)
    config = copy.deepcopy(reference.config)
    fresh = _section(config)
    for key in _COUNTS:
        if fresh.get(key) == count:
            fresh[key] = len(sources)
    read = {id(model): _with_types(model) for layer in sources for model, _ in layer}
    kinds = [[(read[id(model)], number) for model, number in layer] for layer in sources]
    for key in sorted({key for layer in kinds for of, _ in layer for key in of} | set(own)):
        found = _of_layers(key, kinds, where)
        if found is not None:
            fresh[key] = found
    _check_patterns(fresh, kinds, where)
    _check_made(config, sources, where)
    return config


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the layers: itself, or that of its text model."""
    text = config.get("text_config")
    inner = isinstance(text, dict) and _count(config) is None
    return text if inner else config  # pyright: ignore[reportReturnType]


def _count(config: Mapping[str, Any]) -> int | None:
    found = [config[key] for key in _COUNTS if type(config.get(key)) is int]
    return found[0] if found else None


def _with_types(model: Checkpoint) -> dict[str, Any]:
    """Return a model's config, with the kinds of attention that its class derives where the file has none."""
    own = dict(_section(model.config))
    if "layer_types" not in own and own.get("model_type"):
        from transformers import CONFIG_MAPPING

        if own["model_type"] in CONFIG_MAPPING:
            made = CONFIG_MAPPING[own["model_type"]].from_dict(own).to_dict()
            if isinstance(made.get("layer_types"), list):
                own["layer_types"] = made["layer_types"]
    return own


def _of_layers(
    key: str, kinds: Sequence[Sequence[tuple[dict[str, Any], int]]], where: str
) -> list[Any] | None:
    """Return a field's list for the layers of the output, or None where it is not a list of layers."""
    configs = [config for layer in kinds for config, _ in layer]
    lists = [config for config in configs if isinstance(config.get(key), list) and config[key]]
    if not lists:
        return None
    if key in _NUMBERS:
        inside = [[number in (config.get(key) or ()) for config, number in layer] for layer in kinds]
        for place, found in enumerate(inside):
            _check_agreed(key, found, place, where)
        return [place for place, found in enumerate(inside) if found[0]]
    if not any(len(config[key]) == _count(config) for config in lists) or key in _OTHER_LISTS:
        return None
    known = "layer" in key or key in _OF_LAYERS
    check(known, key, lists[0][key], "known to say something of each layer, or not to", where=where)
    values: list[Any] = []
    for place, layer in enumerate(kinds):
        given = [config.get(key) for config, _ in layer]
        whole = all(
            isinstance(one, list) and len(one) == _count(c) for one, (c, _) in zip(given, layer, strict=True)
        )
        check(whole, key, given[0], "a list over all layers in each model", where=where)
        found = [config[key][number] for config, number in layer]
        _check_agreed(key, found, place, where)
        values.append(found[0])
    return values


def _check_agreed(key: str, found: Sequence[object], place: int, where: str) -> None:
    same = all(one == found[0] for one in found)
    check(same, key, list(found), f"the same in all sources of layer {place}", where=where)


def _check_patterns(
    fresh: dict[str, Any], kinds: Sequence[Sequence[tuple[dict[str, Any], int]]], where: str
) -> None:
    """Refuse layers that a number in the config would make of another kind than they were."""
    for key, kind in _PATTERNS.items():
        if key in _OF_ATTENTION and isinstance(fresh.get("layer_types"), list):
            continue
        for place, layer in enumerate(kinds):
            wanted = _kind(kind, fresh, key, place)
            for config, number in layer:
                had = _kind(kind, config, key, number)
                rule = f"such that layer {place}, made of layer {number}, stays what it is"
                check(had == wanted, key, fresh.get(key), rule, where=where)


def _kind(
    kind: Callable[[dict[str, Any], int, int], object], config: dict[str, Any], key: str, place: int
) -> object:
    value = config.get(key)
    return kind(config, value, place) if type(value) is int and value > 0 else None


def _check_made(config: dict[str, Any], sources: Sources, where: str) -> None:
    """Refuse layers of which the model's class, by a rule of its own, would make another kind than they were.

    Classes that transformers does not have are not asked.
    """
    try:
        new = _made(config)
    except Exception as error:
        raise ValueError(f"slices: no model can be made with these layers ({where}): {error!r}") from error
    if new is None:
        return
    known: dict[int, list[dict[str, torch.Size]] | None] = {}
    for place, layer in enumerate(sources):
        for model, number in layer:
            if id(model) not in known:
                known[id(model)] = _made_or_none(model.config)
            old = known[id(model)]
            if old is None or old[number] == new[place]:
                continue
            other = sorted(
                key for key in {**old[number], **new[place]} if old[number].get(key) != new[place].get(key)
            )
            rule = f"such that layer {place} is of the kind that layer {number} of {model.label} is"
            check(False, "slices", f"other tensors there: {', '.join(other[:4])}", rule, where=where)


def _made_or_none(config: Mapping[str, Any]) -> list[dict[str, torch.Size]] | None:
    try:
        return _made(config)
    except Exception:  # noqa: BLE001 - a model that is there, whatever its class makes of it today
        return None


def _made(config: Mapping[str, Any]) -> list[dict[str, torch.Size]] | None:
    """Return the tensors of each layer that the config's class makes; None where there is no such class.

    Nothing is allocated.
    """
    import transformers

    name = next(iter(config.get("architectures") or ()), None)
    made: Any = getattr(transformers, str(name), None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        return None
    settings: Any = made.config_class
    with torch.device("meta"):
        state = made(settings.from_dict(dict(config))).state_dict()
    lists: dict[str, dict[int, dict[str, torch.Size]]] = {}
    for key, value in state.items():
        match = re.match(r"(.*?)\b(\d+)\.(.+)", key)
        if match is not None:
            lists.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value.shape
    count = stated_layers(config)
    whole = [found for found in lists.values() if sorted(found) == list(range(count or 0))]
    return [whole[0][number] for number in range(count or 0)] if len(whole) == 1 else None
