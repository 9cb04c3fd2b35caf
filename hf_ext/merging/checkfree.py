"""CheckFree: layers that are lost, or damaged, made anew from the layers beside them.

Source: Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", arXiv 2506.15461, algorithm
1: a lost stage of a pipeline becomes the mean of its two neighbours, weighted by the norms of their last
gradients: W_i = (omega_{i-1} W_{i-1} + omega_{i+1} W_{i+1}) / (omega_{i-1} + omega_{i+1}).

Differs from the paper:
- The norms are those before clipping; the authors' code takes them after each stage was clipped to 1, which
  makes both 1, and a plain mean, whenever both were clipped.
- omega enters as (|g| + eps)^p with p = 1, as in the authors' code; p = 2 weights by squared norms.
- Where only one side survives its layers are copied. CheckFree+, which trains the first and last stages to
  stand in for each other, is left out, and so is the raised learning rate of a rebuilt stage.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check
from ..core.files import atomic_folder, write_json, write_tensors
from ._checkpoint import DTYPES, INDEX, Checkpoint, Entry
from ._side_files import copy_side_files

__all__ = ["Recovery", "gradient_norms", "recover_checkpoint", "recover_layers", "recovery_weights"]

REPORT = "recovery.json"


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


def gradient_norms(model: nn.Module, prefix: str | None = None) -> dict[int, float]:
    """Return the norm of each layer's gradient, for `norms` of the functions here.

    Call it after the backward pass and before gradients are clipped.

    Args:
        model: The model, with gradients.
        prefix: Name of the list of layers, such as "model.layers"; None to find it.

    Raises:
        ValueError: Parameters are sharded, or there is no list of layers.
    """
    named = dict(model.named_parameters())
    _refuse_sharded(named)
    squares: dict[int, Tensor] = {}
    for layer, rests in _layers(named, prefix)[1].items():
        grads = [named[name].grad for name in rests.values()]
        norms = [grad.detach().float().norm() ** 2 for grad in grads if grad is not None]
        squares[layer] = torch.stack(norms).sum() if norms else torch.tensor(0.0)
    return {layer: float(square) ** 0.5 for layer, square in squares.items()}


def recover_layers(
    model: nn.Module,
    layers: Sequence[int],
    *,
    norms: Mapping[int, float] | None = None,
    stage_size: int | None = None,
    norm_power: float = 1.0,
    eps: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
    prefix: str | None = None,
) -> Recovery:
    """Rebuild lost layers of a model in place, and go on training.

    Args:
        model: The model; what the lost layers hold does not matter.
        layers: Numbers of the lost layers.
        norms: Gradient norm of each layer, from `gradient_norms`; None for equal weights.
        stage_size: Layers of a stage; None for the number of lost layers. Layer j of a stage is made of layer
            j of the stages before and after.
        norm_power: Exponent of the norms, at least 0.
        eps: Added to a stage's norm, above 0.
        optimizer: Its state of the rebuilt parameters is dropped, so that it starts afresh for them.
        prefix: Name of the list of layers, such as "model.layers"; None to find it.

    Returns:
        What was made of what.

    Raises:
        ValueError: A layer does not exist, no stage survives, a neighbour has other tensors, or parameters
            are sharded. The model is then unchanged.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    _refuse_sharded(named)
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    plan = _plan(shapes, layers, norms, stage_size, norm_power, eps, prefix)
    with torch.no_grad():
        for name, sources in plan.sources.items():
            named[name].copy_(_rebuilt([(named[source], weight) for source, weight in sources]))
    if optimizer is not None:
        for name in plan.sources:
            optimizer.state.pop(named[name], None)
    return plan.recovery()


def recover_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    layers: Sequence[int],
    *,
    norms: Mapping[int, float] | None = None,
    stage_size: int | None = None,
    norm_power: float = 1.0,
    eps: float = 1e-4,
    prefix: str | None = None,
) -> Recovery:
    """Write a copy of a saved model in which lost layers are rebuilt from those beside them.

    One file of the model at a time is in memory. All tensors but those of the lost layers keep their bytes;
    means are taken in fp32 and rounded once. The folder appears when all of it is there; recovery.json in it
    says what was made of what.

    Args:
        checkpoint: Folder of a saved model (safetensors); what the lost layers hold does not matter.
        out: The folder to write; it may not exist, or must be empty.
        layers: Numbers of the lost layers.
        norms: Gradient norm of each layer; None for equal weights.
        stage_size: Layers of a stage; None for the number of lost layers.
        norm_power: Exponent of the norms, at least 0.
        eps: Added to a stage's norm, above 0.
        prefix: Name of the list of layers, such as "model.layers"; None to find it.

    Returns:
        What was made of what.

    Raises:
        FileNotFoundError: The folder, or a file of it, is not there.
        ValueError: A layer does not exist, no stage survives, a neighbour has other tensors, or `out` holds
            something. Nothing is then written.
        OSError: The output cannot be written.
    """
    out = Path(out)
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(empty, "out", str(out), "a folder that does not exist, or is empty")
    source = Checkpoint(checkpoint)
    try:
        shapes = {name: entry.shape for name, entry in source.tensors.items()}
        plan = _plan(shapes, layers, norms, stage_size, norm_power, eps, prefix)
        _refuse_other_types(source, plan)
        with atomic_folder(out) as fresh:
            copy_side_files(source, fresh, None)
            for path in source.files:
                names = [name for name, entry in source.tensors.items() if entry.path == path]
                tensors = {name: _recovered(source, plan, name) for name in names}
                write_tensors(fresh / path.name, tensors, {"format": "pt"})
            if (source.folder / INDEX).exists():
                (fresh / INDEX).write_bytes((source.folder / INDEX).read_bytes())
            found = plan.recovery()
            write_json(fresh / REPORT, {"layers": _text(found.layers), "tensors": list(found.tensors)})
    finally:
        source.close()
    return found


def _text(layers: Mapping[int, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {str(j): {str(k): weight for k, weight in parts.items()} for j, parts in layers.items()}


def _recovered(source: Checkpoint, plan: _Plan, name: str) -> Tensor:
    if name not in plan.sources:
        return _read(source, source.tensors[name])
    parts = [(_read(source, source.tensors[part]), weight) for part, weight in plan.sources[name]]
    values = _rebuilt(parts)
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        made = ", ".join(part for part, _ in plan.sources[name])
        raise ValueError(f"{name}: NaN or infinite values in {made}")
    return values


def _read(source: Checkpoint, entry: Entry) -> Tensor:
    values = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
    source.read(entry, 0, values)
    return values.view(entry.shape)


def _rebuilt(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return a + t (b - a), so that equal neighbours come back bit for bit; in the first one's dtype."""
    first = parts[0][0]
    if len(parts) == 1 or not first.is_floating_point():
        return first.detach().clone()
    a, b = (part.detach().float() for part, _ in parts)
    return torch.add(a, (b - a).mul_(parts[1][1])).to(first.dtype)


# Which layers are made of which -------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    layers: Mapping[int, Mapping[int, float]]
    sources: Mapping[str, Sequence[tuple[str, float]]]

    def recovery(self) -> Recovery:
        return Recovery(self.layers, tuple(self.sources))


def _plan(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Sequence[int],
    norms: Mapping[int, float] | None,
    stage_size: int | None,
    norm_power: float,
    eps: float,
    prefix: str | None,
) -> _Plan:
    stem, rests = _layers(shapes, prefix)
    lost = sorted(set(layers))
    check(bool(lost), "layers", list(layers), "at least one number")
    unknown = [layer for layer in lost if layer not in rests]
    check(not unknown, "layers", unknown, f"layers of {stem}, 0 to {max(rests)}")
    size = len(lost) if stage_size is None else stage_size
    check(size >= 1, "stage_size", size, "at least 1")
    found: dict[int, dict[int, float]] = {}
    sources: dict[str, list[tuple[str, float]]] = {}
    for layer in lost:
        found[layer] = _neighbours(layer, lost, rests, size, norms, norm_power, eps)
        parts = list(found[layer].items())
        _check_equal(stem, layer, [other for other, _ in parts], rests, shapes)
        for rest, name in rests[layer].items():
            sources[name] = [(rests[other][rest], weight) for other, weight in parts]
    return _Plan(found, sources)


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


def _layers(names: Iterable[str], prefix: str | None) -> tuple[str, dict[int, dict[str, str]]]:
    """Return the name of the list of layers, and for each layer its tensors by the rest of their names."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.(.+)$", f".{name}")
        if match:
            stem, number, rest = match.group(1).removeprefix("."), int(match.group(2)), match.group(3)
            found.setdefault(stem, {}).setdefault(number, {})[rest] = name
    if prefix is not None:
        check(prefix in found, "prefix", prefix, f"one of {', '.join(sorted(found)) or 'none'}")
        return prefix, found[prefix]
    lists = {stem: layers for stem, layers in found.items() if len(layers) > 1}
    check(
        len(lists) == 1, "prefix", prefix, f"given: lists of layers are {', '.join(sorted(lists)) or 'none'}"
    )
    ((stem, layers),) = lists.items()
    return stem, layers


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


def _refuse_other_types(source: Checkpoint, plan: _Plan) -> None:
    for name, parts in plan.sources.items():
        kinds = {source.tensors[part].dtype for part in (name, *(part for part, _ in parts))}
        check(len(kinds) == 1, "dtype", sorted(kinds), "that of the neighbours' tensors", where=name)


def _refuse_sharded(named: Mapping[str, Any]) -> None:
    sharded = next((name for name, value in named.items() if hasattr(value, "full_tensor")), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded: a process that is lost takes a part of every layer with it, and no layer "
            "can be rebuilt from another one; resume from a checkpoint"
        )
