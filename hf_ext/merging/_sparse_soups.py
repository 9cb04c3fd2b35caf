"""The workflow of sparse model soups: prune, retrain copies, average them, and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch_norm import batch_norms, recalibrate_batch_norm
from ..core.checks import check, check_choice
from ..core.files import read_json, read_tensors, write_json, write_tensors
from ._pruning import apply_masks, magnitude_masks, masks_enforced, prunable


@dataclass(frozen=True)
class SparseSoupResult:
    """What a workflow has come to; the model it was given holds the weights.

    Args:
        masks: True where a weight is kept, by parameter.
        sparsities: Share of zeros among the prunable weights after each phase.
        chosen: The copies that each phase has averaged.
        scores: Scores of each phase's copies, and of their average as the last; empty without `score`.
    """

    masks: Mapping[str, Tensor]
    sparsities: tuple[float, ...]
    chosen: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]


def phase_sparsities(sparsity: float, phases: int) -> list[float]:
    """Return the total sparsity after each phase, each of which cuts the same share of what remains.

    Args:
        sparsity: s, that of the last one.
        phases: P; phase k ends at 1 - (1 - s)^(k / P).
    """
    return [1.0 - (1.0 - sparsity) ** (k / phases) for k in range(1, phases)] + [sparsity]


def greedy_choice(scores: Sequence[float], score_of: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Return which copies a greedy soup averages: from the best on, each that does not lower the score.

    Args:
        scores: Score of each copy alone; higher is better.
        score_of: Takes the numbers of copies, and returns the score of their average.
    """
    order = sorted(range(len(scores)), key=lambda copy: (-scores[copy], copy))
    chosen, best = (order[0],), scores[order[0]]
    for copy in order[1:]:
        found = score_of((*chosen, copy))
        if found >= best:
            chosen, best = (*chosen, copy), found
    return chosen


def prune_retrain_average(
    model: nn.Module,
    retrain: Callable[[nn.Module, int, int], object],
    *,
    sparsity: float = 0.9,
    phases: int = 3,
    copies: int = 3,
    soup: str = "uniform",
    scope: str = "global",
    score: Callable[[nn.Module], float] | None = None,
    batches: Callable[[], Iterable[Any]] | None = None,
    weights: Sequence[str] | None = None,
    folder: str | Path | None = None,
) -> SparseSoupResult:
    """Prune a model in phases; after each retrain some copies with the same mask, and average them.

    Args:
        model: The dense model; it holds the sparse one in the end.
        retrain: Called with the model, the phase and the copy (both from 0); trains the model in place with
            any optimizer of torch's, say with the copy as its seed. Masked weights are zero after each step.
        sparsity: Share of zeros among the prunable weights in the end, in (0, 1).
        phases: Times to prune and retrain.
        copies: Retrained copies of each phase; 1 is iterative magnitude pruning.
        soup: "uniform", or "greedy" by `score`.
        scope: "global" for one threshold, or "uniform" for the same sparsity in each tensor.
        score: Takes a model, and returns a number that is higher for a better one.
        batches: Returns batches for the running statistics of batch norms; needed where there are any.
        weights: Names of the parameters to prune; None for all linear and convolutional weights but those
            tied to an embedding.
        folder: Where to keep the copies, so that an interrupted call is gone on with by the same call; None
            to keep them in memory alone.

    Returns:
        Masks, and what the phases came to.

    Raises:
        ValueError: A setting is outside its range, batch norms have no `batches`, a layer would lose all its
            weights, or the folder is of another workflow.
    """
    check(0.0 < sparsity < 1.0, "sparsity", sparsity, "in (0, 1)")
    check(phases >= 1, "phases", phases, "at least 1")
    check(copies >= 1, "copies", copies, "at least 1")
    check_choice("soup", soup, ("uniform", "greedy"))
    check_choice("scope", scope, ("global", "uniform"))
    check(soup == "uniform" or score is not None, "score", score, "given for soup='greedy'")
    check(not batch_norms(model) or batches is not None, "batches", batches, "given: there are batch norms")
    named = dict(model.named_parameters())
    names = sorted(prunable(model) if weights is None else weights)
    unknown = [name for name in names if name not in named]
    check(bool(names) and not unknown, "weights", unknown or names, "names of parameters of the model")
    settings = {"sparsity": sparsity, "phases": phases, "copies": copies, "soup": soup, "scope": scope}
    store = _Copies(folder, {**settings, "weights": names, "start": _digest(model)})

    masks: dict[str, Tensor] = {}
    reached: list[float] = []
    chosen: list[tuple[int, ...]] = []
    scores: list[tuple[float, ...]] = []
    for phase, goal in enumerate(phase_sparsities(sparsity, phases)):
        masks = magnitude_masks({n: named[n] for n in names}, goal, previous=masks or None, scope=scope)
        start = _state(model)
        states: list[dict[str, Tensor]] = []
        for copy in range(copies):
            state = store.read(phase, copy)
            if state is None:
                model.load_state_dict(start)
                with masks_enforced(model, masks):
                    retrain(model, phase, copy)
                model.zero_grad(set_to_none=True)
                state = _state(model)
                store.write(phase, copy, state)
            states.append(state)
        taken, found = _average(model, states, masks, soup, score, batches)
        chosen.append(taken)
        scores.append(found)
        total = sum(mask.numel() for mask in masks.values())
        reached.append(1.0 - sum(int(mask.sum()) for mask in masks.values()) / total)
    return SparseSoupResult(masks, tuple(reached), tuple(chosen), tuple(scores))


def _average(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    masks: Mapping[str, Tensor],
    soup: str,
    score: Callable[[nn.Module], float] | None,
    batches: Callable[[], Iterable[Any]] | None,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Load the average of a phase's copies, and return which they are and the scores."""

    def load(members: Sequence[int]) -> None:
        model.load_state_dict(mean_state([states[member] for member in members]))
        apply_masks(model, masks)
        if batches is not None and len(members) > 1:
            recalibrate_batch_norm(model, batches())

    def score_of(members: Sequence[int]) -> float:
        load(members)
        assert score is not None
        return float(score(model))

    members = tuple(range(len(states)))
    alone = tuple(score_of((member,)) for member in members) if score is not None else ()
    if soup == "greedy":
        members = greedy_choice(alone, score_of)
    load(members)
    return members, (*alone, float(score(model))) if score is not None else ()


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of floating tensors, taken in fp32; other tensors are the first state's.

    A weight that is zero in all states is zero in the mean, and equal states have themselves as their mean.
    """
    found: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = first.clone()
            continue
        mean = first.to(torch.float32, copy=True)
        for number, state in enumerate(states[1:], start=2):
            mean.lerp_(state[name].to(torch.float32), 1.0 / number)
        found[name] = mean.to(first.dtype)
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    # On the CPU, where the means are taken: a copy that was read from a file has the same bits there.
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Copies:
    """The retrained copies in a folder, or none."""

    def __init__(self, folder: str | Path | None, plan: Mapping[str, object]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        path = self.folder / "plan.json"
        if path.exists():
            known = read_json(path)
            differing = sorted(key for key in {*plan, *known} if known.get(key) != plan.get(key))
            rule = f"that of this workflow; it differs in {', '.join(differing)}"
            check(not differing, "folder", str(self.folder), rule)
        else:
            write_json(path, dict(plan))

    def _path(self, phase: int, copy: int) -> Path:
        assert self.folder is not None
        return self.folder / f"phase-{phase}-copy-{copy}.safetensors"

    def read(self, phase: int, copy: int) -> dict[str, Tensor] | None:
        if self.folder is None or not self._path(phase, copy).exists():
            return None
        return read_tensors(self._path(phase, copy))

    def write(self, phase: int, copy: int, state: Mapping[str, Tensor]) -> None:
        if self.folder is not None:
            write_tensors(self._path(phase, copy), state)
