"""Greedy soup: models are added to a uniform average, best first, as long as the average does not get worse.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", arXiv 2203.05482, recipe 1 (greedy soup).

Differs from the paper: the metric is the user's, minimized unless `greater_is_better` is set. It is given the
averaged model in memory; no candidate is written. Models of equal score keep the order in which they came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.checks import check
from ._base import register_merge
from ._candidates import Candidates, Evaluate, evaluation_losses, metric_of
from ._coefficients import FoundWeights, expanded, folders_of, with_models
from ._config import MergeConfig, ParentConfig

__all__ = ["GreedySoup", "greedy_soup_weights", "greedy_weights"]


def greedy_weights(
    count: int, score: Callable[[Sequence[float]], float], *, greater_is_better: bool = False
) -> list[float]:
    """Return the weights of a greedy soup: 1 / kept for each model that is kept, 0 for the others.

    Args:
        count: Number of models.
        score: Takes one weight for each model, of sum one, and returns the score of that average.
        greater_is_better: Whether a greater score is better.

    Raises:
        ValueError: No single model has a finite score.
    """
    sign = -1.0 if greater_is_better else 1.0

    def cost(members: Sequence[int]) -> float:
        found = sign * score(_uniform(count, members))
        return math.inf if math.isnan(found) else found

    single = [cost([number]) for number in range(count)]
    order = sorted(range(count), key=single.__getitem__)
    kept, best = order[:1], single[order[0]]
    check(math.isfinite(best), "metric", single, "finite for one model at least")
    for number in order[1:]:
        if not math.isfinite(single[number]):
            continue
        found = cost([*kept, number])
        if found <= best:
            kept, best = [*kept, number], found
    return _uniform(count, kept)


def _uniform(count: int, members: Sequence[int]) -> list[float]:
    return [1.0 / len(members) if number in members else 0.0 for number in range(count)]


@register_merge(
    "greedy_soup",
    summary="uniform mean of those models that do not make it worse by your metric, added best first",
    paper="arXiv:2203.05482",
    supports={"identity", "one_parent", "symmetric", "zero_weight"},
    test_kwargs={"weight": 1.0},
    bad_kwargs=({"weight": float("inf")}, {"metric": "no_colon"}, {"greater_is_better": "yes"}),
)
@dataclass(frozen=True, kw_only=True)
class GreedySoup(FoundWeights):
    """Uniform mean of the models that a greedy choice by a metric has kept.

    Args:
        metric: "module:function" of what is minimized, a function of the model; None for the loss on `data`.
        data: Folder of `save_to_disk`, or file of JSON lines, with `input_ids` (and `labels`) or `text`.
        greater_is_better: Whether the metric is maximized.
    """

    metric: str | None = None
    data: str | None = None
    greater_is_better: bool = False

    def validate(self) -> None:
        fits = self.metric is None or ":" in self.metric
        check(fits, "metric", self.metric, "of the form module:function")

    def prepare(self, config: MergeConfig, out: Path) -> MergeConfig:
        models = expanded(config.models)
        given = ["weight" in model.parameters for model in models]
        if all(given) or "weight" in config.parameters:
            return with_models(config, models)
        check(not any(given), "weight", given, "given for all models or for none")
        folders = [Path(model.model) for model in models]
        weights = greedy_soup_weights(
            folders, self.metric, data=self.data, greater_is_better=self.greater_is_better
        )
        weighted = [
            ParentConfig(model=model.model, revision=model.revision, parameters={"weight": weight})
            for model, weight in zip(models, weights, strict=True)
        ]
        adapters = all((folder / "adapter_model.safetensors").exists() for folder in folders)
        rule = "factors, which is what was evaluated, or auto"
        check(not adapters or config.space in ("auto", "factors"), "space", config.space, rule)
        return with_models(config, weighted, space="factors" if adapters else config.space)


def greedy_soup_weights(
    models: str | Path | Sequence[str | Path],
    evaluate: Evaluate | str | None = None,
    *,
    data: str | Path | Iterable[Any] | None = None,
    model: nn.Module | None = None,
    greater_is_better: bool = False,
    in_memory: bool = True,
) -> list[float]:
    """Evaluate models and averages of them in memory, and return the weights of the greedy soup.

    N models take 2 N - 1 evaluations.

    Args:
        models: Folders of models or of adapters of one base, or a run's folder for its checkpoints.
        evaluate: Takes the model and returns a number; or its name as "module:function"; None for the loss
            on `data`.
        data: Rows, or a path, with `input_ids` (and `labels`) or `text`.
        model: The module that takes the weights; None to load the last of the models as a causal language
            model.
        greater_is_better: Whether the metric is maximized.
        in_memory: Whether all models are held in memory, rather than read for every average.

    Raises:
        FileNotFoundError: A folder or file does not exist.
        ValueError: The models cannot be averaged, or the metric is never finite.
    """
    folders = folders_of(models)
    check((evaluate is None) != (data is None), "metric", evaluate, "given, or data instead: one of them")
    if evaluate is None:
        check(not greater_is_better, "greater_is_better", True, "False where the loss on data is minimized")
        assert data is not None
        metric: Evaluate = evaluation_losses(data, folders[-1], 0.0)[0]
    else:
        metric = metric_of(evaluate)
    candidates = Candidates(folders, model, in_memory=in_memory)
    try:
        return greedy_weights(
            len(folders),
            lambda weights: _finite_or_nan(candidates.score(weights, metric)),
            greater_is_better=greater_is_better,
        )
    finally:
        candidates.close()


def _finite_or_nan(score: float) -> float:
    # Infinite stands for a score that is none, which is worst whichever way is better.
    return score if math.isfinite(score) else math.nan
