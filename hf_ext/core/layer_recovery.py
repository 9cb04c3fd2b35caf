"""Lost layers made anew from the layers beside them (CheckFree): the weights, and what is made of what.

Source: Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", arXiv 2506.15461, algorithm
1: W_i = (omega_{i-1} W_{i-1} + omega_{i+1} W_{i+1}) / (omega_{i-1} + omega_{i+1}), omega a stage's gradient
norm. Files are the work of `merging.checkfree`, models in training of `callbacks.stage_recovery`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check
from .state import load_scalars

# Where the callback that records gradient norms writes them in a checkpoint.
STATE = "hf_ext_stage_recovery"
WHY_NOT_SHARDED = (
    "a process that is lost takes a part of every layer with it, and no layer can be rebuilt from another "
    "one; resume from a checkpoint"
)


@dataclass(frozen=True)
class Recovery:
    """How layers were rebuilt.

    Args:
        layers: For each lost layer the layers it was made of, with their weights.
        tensors: Names of the tensors that were rebuilt.
    """

    layers: Mapping[int, Mapping[int, float]]
    tensors: tuple[str, ...]


def recovery_weights(
    left: float, right: float, *, norm_power: float = 1.0, eps: float = 1e-4
) -> tuple[float, float]:
    """Return the weights of the stages before and after a lost one.

    Args:
        left: Gradient norm of the stage before, at least 0.
        right: That of the stage after.
        norm_power: Exponent, at least 0; 0 for equal weights.
        eps: Added to the norms, above 0.

    Raises:
        ValueError: A number is outside its range.
    """
    for name, value in (("left", left), ("right", right), ("norm_power", norm_power)):
        check(0.0 <= value < float("inf"), name, value, "a finite number, at least 0")
    check(eps > 0.0, "eps", eps, "above 0")
    a, b = (left + eps) ** norm_power, (right + eps) ** norm_power
    return a / (a + b), b / (a + b)


def rebuilt(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return a + t (b - a), so that equal neighbours come back bit for bit; in the first one's dtype."""
    first = parts[0][0]
    if len(parts) == 1 or not first.is_floating_point():
        return first.detach().clone()
    a, b = (part.detach().float() for part, _ in parts)
    return torch.add(a, (b - a).mul_(parts[1][1])).to(first.dtype)


@dataclass(frozen=True)
class RecoveryPlan:
    """What is made of what.

    Args:
        layers: For each lost layer its sources, with their weights.
        sources: For each tensor of theirs the tensors that it is made of, with the same weights.
    """

    layers: Mapping[int, Mapping[int, float]]
    sources: Mapping[str, Sequence[tuple[str, float]]]

    def recovery(self) -> Recovery:
        """Return it as a report."""
        return Recovery(self.layers, tuple(self.sources))


def swap_partners(count: int, size: int) -> dict[int, int]:
    """Return for each layer of the outer stages that which takes its place in a swap (CheckFree+).

    Args:
        count: Number of layers.
        size: Layers of a stage.

    Raises:
        ValueError: There are fewer than four stages.
    """
    stages = count // size
    check(stages >= 4, "stages", stages, "at least 4 to swap the outer ones")
    pairs = [(start + j, start + size + j) for start in (0, count - 2 * size) for j in range(size)]
    return {**dict(pairs), **{b: a for a, b in pairs}}


def plan_recovery(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Sequence[int],
    norms: Mapping[int, float] | None = None,
    *,
    stage_size: int | None = None,
    norm_power: float = 1.0,
    eps: float = 1e-4,
    prefix: str | None = None,
    partners: Mapping[int, int] | None = None,
    kinds: Sequence[str] | None = None,
) -> RecoveryPlan:
    """Return of which tensors those of lost layers are made.

    Args:
        shapes: Shape of each tensor of the model, by name.
        layers: Numbers of the lost layers.
        norms: Gradient norm of each layer; None for equal weights.
        stage_size: Layers of a stage; None for the number of lost layers.
        norm_power: Exponent of the norms, at least 0.
        eps: Added to a stage's norm, above 0.
        prefix: Name of the list of layers, such as "model.layers"; None to find it.
        partners: Layers that are copied from another one where that is left (CheckFree+).
        kinds: What each layer is, such as "sliding_attention"; None where all are alike.

    Raises:
        ValueError: A layer does not exist, no stage survives, a norm is missing, or a neighbour is of another
            kind or has other tensors.
    """
    stem, rests = find_layers(shapes, prefix)
    lost = sorted(set(layers))
    check(bool(lost), "layers", list(layers), "at least one number")
    unknown = [layer for layer in lost if layer not in rests]
    check(not unknown, "layers", unknown, f"layers of {stem}, 0 to {max(rests)}")
    size = len(lost) if stage_size is None else stage_size
    check(size >= 1, "stage_size", size, "at least 1")
    found: dict[int, dict[int, float]] = {}
    sources: dict[str, list[tuple[str, float]]] = {}
    for layer in lost:
        partner = (partners or {}).get(layer)
        if partner is not None and partner not in lost:
            found[layer] = {partner: 1.0}
        else:
            found[layer] = _neighbours(layer, lost, rests, size, norms, norm_power, eps)
        parts = list(found[layer].items())
        check_alike(stem, layer, [other for other, _ in parts], kinds)
        _check_equal(stem, layer, [other for other, _ in parts], rests, shapes)
        for rest, name in rests[layer].items():
            sources[name] = [(rests[other][rest], weight) for other, weight in parts]
    return RecoveryPlan(found, sources)


def _neighbours(
    layer: int,
    lost: Sequence[int],
    rests: Mapping[int, Mapping[str, str]],
    size: int,
    norms: Mapping[int, float] | None,
    norm_power: float,
    eps: float,
) -> dict[int, float]:
    def nearest(step: int) -> int | None:
        other = layer + step
        while other in rests and other in lost:
            other += step
        return other if other in rests else None

    left, right = nearest(-size), nearest(size)
    if left is None and right is None:
        raise ValueError(f"layers: no stage is left beside layer {layer} (stages of {size} layers)")
    for other in (left, right):
        if other is not None and abs(other - layer) != size:
            warnings.warn(f"layer {layer} is made of layer {other}, more than a stage away", stacklevel=5)
    if left is None or right is None:
        return {other: 1.0 for other in (left, right) if other is not None}
    if norms is None:
        return {left: 0.5, right: 0.5}
    a, b = (_stage_norm(other, min(lost), size, rests, norms) for other in (left, right))
    weights = recovery_weights(a, b, norm_power=norm_power, eps=eps)
    return {left: weights[0], right: weights[1]}


def _stage_norm(
    layer: int, start: int, size: int, rests: Mapping[int, Any], norms: Mapping[int, float]
) -> float:
    """Return the norm of the stage that a layer is of; stages are counted from the first lost layer."""
    first = start + (layer - start) // size * size
    members = [member for member in range(first, first + size) if member in rests]
    missing = [member for member in members if member not in norms]
    check(not missing, "norms", sorted(norms), f"given for layers {missing} too")
    return sum(norms[member] ** 2 for member in members) ** 0.5


def find_layers(names: Iterable[str], prefix: str | None = None) -> tuple[str, dict[int, dict[str, str]]]:
    """Return the name of the list of layers, and for each layer its tensors by the rest of their names.

    Args:
        names: Names of a model's tensors.
        prefix: Name of the list; None to find the only one.

    Raises:
        ValueError: There is no such list, or there are several and none was named.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.(.+)$", f".{name}")
        if match:
            stem, number, rest = match.group(1).removeprefix("."), int(match.group(2)), match.group(3)
            found.setdefault(stem, {}).setdefault(number, {})[rest] = name
    if prefix is not None:
        check(prefix in found, "prefix", prefix, f"one of {', '.join(sorted(found)) or 'none'}")
        return prefix, found[prefix]
    lists = {stem: layers for stem, layers in found.items() if len(layers) > 1} or found
    check(
        len(lists) == 1, "prefix", prefix, f"given: lists of layers are {', '.join(sorted(lists)) or 'none'}"
    )
    ((stem, layers),) = lists.items()
    return stem, layers


def check_alike(stem: str, layer: int, others: Iterable[int], kinds: Sequence[str] | None) -> None:
    """Raise unless a layer does the same with its tensors as others do.

    Raises:
        ValueError: One is of another kind.
    """
    if kinds is None:
        return
    for other in others:
        if kinds[layer] != kinds[other]:
            raise ValueError(
                f"{stem}.{layer} cannot be made of {stem}.{other}: they are {kinds[layer]} and {kinds[other]}"
            )


def _check_equal(
    stem: str,
    layer: int,
    others: Sequence[int],
    rests: Mapping[int, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    own = {rest: shapes[name] for rest, name in rests[layer].items()}
    for other in others:
        theirs = {rest: shapes[name] for rest, name in rests[other].items()}
        differing = sorted(rest for rest in {*own, *theirs} if own.get(rest) != theirs.get(rest))
        if differing:
            named = ", ".join(f"{rest} {own.get(rest)} and {theirs.get(rest)}" for rest in differing[:5])
            raise ValueError(f"{stem}.{layer} cannot be made of {stem}.{other}: {named}")


def layer_kinds(config: Any, count: int) -> list[str] | None:
    """Return what each layer is, from the `layer_types` of a model's config; None where it says nothing.

    Args:
        config: The config as an object or a mapping, or None.
        count: Number of layers.
    """
    for holder in (config, _entry(config, "text_config")):
        found = _entry(holder, "layer_types")
        if isinstance(found, list | tuple) and len(found) == count:  # pyright: ignore[reportUnknownArgumentType]
            return [str(kind) for kind in found]  # pyright: ignore[reportUnknownVariableType]
    return None


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)  # pyright: ignore


def recorded_gradient_norms(checkpoint: str | Path) -> dict[int, float]:
    """Return each layer's gradient norm before clipping, as StageRecoveryCallback left it in a checkpoint.

    Args:
        checkpoint: The checkpoint's folder.

    Raises:
        FileNotFoundError: The callback was not in that run.
        ValueError: Its file is damaged, or no step had been made.
    """
    try:
        scalars = load_scalars(checkpoint, STATE)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint} has no {STATE}.json: norms are recorded by StageRecoveryCallback; "
            "without them, ask for equal weights"
        ) from error
    norms = scalars.get("state", {}).get("norms")
    usable = isinstance(norms, list) and all(isinstance(norm, int | float) for norm in norms)  # pyright: ignore
    check(usable and bool(norms), "norms", norms, "a list of numbers", where=f"{STATE}.json in {checkpoint}")
    return {layer: float(norm) for layer, norm in enumerate(norms)}


def refuse_sharded(named: Mapping[str, Any]) -> None:
    """Raise where a process holds a part of every layer.

    Raises:
        ValueError: A tensor is sharded.
    """
    sharded = next((name for name, value in named.items() if hasattr(value, "full_tensor")), None)
    if sharded is not None:
        raise ValueError(f"{sharded} is sharded: {WHY_NOT_SHARDED}")
