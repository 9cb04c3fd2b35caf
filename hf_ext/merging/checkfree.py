"""CheckFree: layers that are lost, or damaged, made anew from the layers beside them.

Source: Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", arXiv 2506.15461, algorithm
1: a lost stage of a pipeline becomes the mean of its two neighbours, weighted by the norms of their last
gradients: W_i = (omega_{i-1} W_{i-1} + omega_{i+1} W_{i+1}) / (omega_{i-1} + omega_{i+1}).

Differs from the paper:
- The norms are those before clipping; the authors' code takes them after each stage was clipped to 1, which
  makes both 1, and a plain mean, whenever both were clipped.
- omega enters as (|g| + eps)^p with p = 1, as in the authors' code; p = 2 weights by squared norms.
- Where only one side survives its layers are copied. The training of CheckFree+, whose outer stages learn to
  stand in for their neighbors, and the raised learning rate of a rebuilt stage are `StageRecoveryCallback`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.checks import check
from ..core.files import atomic_folder, write_json, write_tensors
from ..core.layer_recovery import (
    STATE,
    Recovery,
    RecoveryPlan,
    find_layers,
    layer_kinds,
    plan_recovery,
    rebuilt,
    recorded_gradient_norms,
    recovery_weights,
    refuse_sharded,
    swap_partners,
)
from ._checkpoint import DTYPES, INDEX, Checkpoint, Entry
from ._side_files import copy_side_files

__all__ = [
    "Recovery",
    "gradient_norms",
    "recorded_gradient_norms",
    "recover_checkpoint",
    "recover_layers",
    "recovery_weights",
]

REPORT = "recovery.json"


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
    refuse_sharded(named)
    squares: dict[int, Tensor] = {}
    for layer, rests in find_layers(named, prefix)[1].items():
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
    refuse_sharded(named)
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    plan = plan_recovery(
        shapes,
        layers,
        norms,
        stage_size=stage_size,
        norm_power=norm_power,
        eps=eps,
        prefix=prefix,
        kinds=layer_kinds(getattr(model, "config", None), len(find_layers(shapes, prefix)[1])),
    )
    with torch.no_grad():
        for name, sources in plan.sources.items():
            named[name].copy_(rebuilt([(named[source], weight) for source, weight in sources]))
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
    swapped: bool = False,
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
        swapped: Whether the model was trained with its outer stages swapped for half of the micro-batches
            (CheckFree+): a lost one is then a copy of its partner.

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
    source = _model(checkpoint)
    try:
        shapes = {name: entry.shape for name, entry in source.tensors.items()}
        count, size = len(find_layers(shapes, prefix)[1]), stage_size or len({*layers})
        plan = plan_recovery(
            shapes,
            layers,
            norms,
            stage_size=stage_size,
            norm_power=norm_power,
            eps=eps,
            prefix=prefix,
            partners=swap_partners(count, size) if swapped else None,
            kinds=layer_kinds(source.config, count),
        )
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


def layers_of_stages(
    checkpoint: str | Path, lost: Sequence[int], stages: int, prefix: str | None = None
) -> tuple[list[int], int]:
    """Return the layers of lost stages of a saved model, and the number of layers of a stage.

    Args:
        checkpoint: Folder of the model.
        lost: Numbers of the lost stages, from 1 on.
        stages: Number of equal stages.
        prefix: Name of the list of layers; None to find it.

    Raises:
        ValueError: The stages do not divide the layers, or one does not exist.
    """
    source = _model(checkpoint)
    try:
        stem, layers = find_layers(source.tensors, prefix)
    finally:
        source.close()
    divides = stages >= 1 and len(layers) % stages == 0
    check(divides, "stages", stages, f"a divisor of {len(layers)}, the layers of {stem}")
    unknown = [stage for stage in lost if not 1 <= stage <= stages]
    check(not unknown, "stage", unknown, f"1 to {stages} (stages are numbered from 1)")
    size = len(layers) // stages
    return [layer for stage in sorted({*lost}) for layer in range((stage - 1) * size, stage * size)], size


def recorded_norms_or_none(
    checkpoint: str | Path, given: str | None
) -> tuple[dict[int, float] | None, str | None]:
    """Return the gradient norms for a recovery, and the folder that they come from.

    Args:
        checkpoint: The folder to recover, whose norms are taken where it has any.
        given: Another folder, which must have them; "none" for no norms; None for those of `checkpoint`.
    """
    if given == "none":
        return None, None
    if given is None and not (Path(checkpoint) / f"{STATE}.json").exists():
        return None, None
    source = str(checkpoint if given is None else given)
    return recorded_gradient_norms(source), source


def _model(folder: str | Path) -> Checkpoint:
    source = Checkpoint(folder)
    try:
        rule = "a whole model's: merge the adapter into its base first, what it trains are no layers"
        check(not source.is_adapter, "checkpoint", str(folder), rule)
    except ValueError:
        source.close()
        raise
    return source


def _text(layers: Mapping[int, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {str(j): {str(k): weight for k, weight in parts.items()} for j, parts in layers.items()}


def _recovered(source: Checkpoint, plan: RecoveryPlan, name: str) -> Tensor:
    if name not in plan.sources:
        return _read(source, source.tensors[name])
    parts = [(_read(source, source.tensors[part]), weight) for part, weight in plan.sources[name]]
    values = rebuilt(parts)
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        made = ", ".join(part for part, _ in plan.sources[name])
        raise ValueError(f"{name}: NaN or infinite values in {made}")
    return values


def _read(source: Checkpoint, entry: Entry) -> Tensor:
    values = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
    source.read(entry, 0, values)
    return values.view(entry.shape)


def _refuse_other_types(source: Checkpoint, plan: RecoveryPlan) -> None:
    for name, parts in plan.sources.items():
        kinds = {source.tensors[part].dtype for part in (name, *(part for part, _ in parts))}
        check(len(kinds) == 1, "dtype", sorted(kinds), "that of the neighbours' tensors", where=name)
