"""LCSC: coefficients for the saved checkpoints of a run, found by an evolutionary search with a metric.

Source: Liu et al. 2024, "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models
Better", arXiv 2404.02241: theta(alpha) = sum_i alpha_i theta_i with sum_i alpha_i = 1 and no constraint of
sign, alpha found without gradients, starting from exponential averages.

Differs from the paper: its search is not published with its code, so that operators and settings here are a
reconstruction: two parents of the best, their mean or a coefficient from either, Gaussian noise, the first
coefficient from the sum. The metric is the user's, or the loss on a data set, where the paper has FID. Ours
is the choice at the end: the best candidates and the starts are scored again on data that the search has
not seen, since a search over-fits a small set. `generation` children may be proposed at once, for Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from tqdm import tqdm

from ..core.checks import check
from ..core.files import read_json, write_json
from ._base import register_merge
from ._candidates import Candidates, Evaluate, evaluation_losses, metric_of, name_of
from ._coefficients import FoundWeights, expanded, folders_of, with_models
from ._config import MergeConfig, ParentConfig
from ._evolution import Evolution, Member, starts
from ._workers import InProcess, RayActors

__all__ = ["Lcsc", "LcscResult", "lcsc_search"]

_TOP = 10  # members of the last population that are scored again at the end


def _rates() -> list[float]:
    return [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]


@register_merge(
    "lcsc",
    summary="combination of one run's checkpoints, its coefficients searched for with your metric",
    paper="arXiv:2404.02241",
    supports={"identity", "one_parent", "symmetric", "zero_weight"},
    test_kwargs={"weight": 1.0},
    bad_kwargs=(
        {"weight": float("inf")},
        {"population": 3},
        {"parents": 1},
        {"iterations": -1},
        {"sigma": 0.0},
        {"ema_rates": [1.5]},
        {"max_l2": 0.0},
        {"holdout": 1.0},
        {"window": 0.0},
        {"workers": -1},
        {"generation": 0},
        {"metric": "no_colon"},
    ),
)
@dataclass(frozen=True, kw_only=True)
class Lcsc(FoundWeights):
    """Linear combination of checkpoints: theta = sum_i w_i theta_i / sum_i w_i with w found by a search.

    Args:
        metric: "module:function" of what is minimized, a function of the model; None for the loss on `data`.
        data: Folder of `save_to_disk`, or file of JSON lines, with `input_ids` (and `labels`) or `text`.
        holdout: Share of `data` that the search does not see and that decides between its best candidates,
            in [0, 1).
        holdout_metric: "module:function" that decides where `metric` is given; None for `metric` itself.
        greater_is_better: Whether the metric is maximized.
        window: Share of a run's checkpoints, the latest, that are combined, in (0, 1].
        population: Members that are kept, at least 4.
        parents: How many of the best have children; None for 0.3 of the population, at least 2.
        iterations: Evaluations after the start, at least 0.
        sigma: Standard deviation of the noise on each coefficient, above 0.
        ema_rates: Rates of the averages that the search starts from, each in [0, 1].
        max_l2: Bound of the norm of all coefficients but the first, above 0.
        generation: Children that are proposed at once; the result depends on it.
        workers: Ray actors that evaluate; 0 for this process.
    """

    metric: str | None = None
    data: str | None = None
    holdout: float = 0.5
    holdout_metric: str | None = None
    greater_is_better: bool = False
    window: float = 0.5
    population: int = 20
    parents: int | None = None
    iterations: int = 200
    sigma: float = 0.1
    ema_rates: list[float] = field(default_factory=_rates)
    max_l2: float = 5.0
    generation: int = 1
    workers: int = 0

    def validate(self) -> None:
        for name in ("metric", "holdout_metric"):
            text = getattr(self, name)
            check(text is None or ":" in text, name, text, "of the form module:function")
        check(0.0 <= self.holdout < 1.0, "holdout", self.holdout, "in [0, 1)")
        check(0.0 < self.window <= 1.0, "window", self.window, "in (0, 1]")
        check(self.population >= 4, "population", self.population, "at least 4")
        fits = self.parents is None or 2 <= self.parents <= self.population
        check(fits, "parents", self.parents, "between 2 and the population")
        check(self.iterations >= 0, "iterations", self.iterations, "at least 0")
        check(self.sigma > 0.0 and math.isfinite(self.sigma), "sigma", self.sigma, "above 0")
        check(all(0.0 <= rate <= 1.0 for rate in self.ema_rates), "ema_rates", self.ema_rates, "in [0, 1]")
        check(self.max_l2 > 0.0 and math.isfinite(self.max_l2), "max_l2", self.max_l2, "above 0")
        check(self.generation >= 1, "generation", self.generation, "at least 1")
        check(self.workers >= 0, "workers", self.workers, "at least 0")

    def evolution(self, seed: int) -> Evolution:
        """Return the search."""
        return Evolution(
            population=self.population,
            parents=self.parents or max(2, int(0.3 * self.population)),
            iterations=self.iterations,
            sigma=self.sigma,
            ema_rates=self.ema_rates,
            max_l2=self.max_l2,
            generation=self.generation,
            seed=seed,
        )

    def prepare(self, config: MergeConfig, out: Path) -> MergeConfig:
        models = expanded(config.models)
        given = ["weight" in model.parameters for model in models]
        if all(given) or "weight" in config.parameters:
            return with_models(config, models)
        check(not any(given), "weight", given, "given for all models or for none")
        if len(config.models) == 1:
            models = _latest(models, self.window)
        folders = [Path(model.model) for model in models]
        state = out.with_name(f"{out.name}.search.json")
        found = _search(folders, self, config.seed, state=state, scored=None, holdout=None)
        weighted = [
            ParentConfig(model=model.model, revision=model.revision, parameters={"weight": weight})
            for model, weight in zip(models, found.coefficients, strict=True)
        ]
        adapters = all((folder / "adapter_model.safetensors").exists() for folder in folders)
        space = "factors" if adapters and config.space == "auto" else config.space
        # What was evaluated are combined factors, and nothing else may be written.
        rule = "factors, which is what was evaluated, or auto"
        check(not adapters or space == "factors", "space", config.space, rule)
        return with_models(config, weighted, space=space)


def _latest(items: Sequence[Any], window: float) -> list[Any]:
    return list(items[-max(2, math.ceil(window * len(items))) :])


@dataclass(frozen=True)
class LcscResult:
    """What a search has found.

    Args:
        checkpoints: The folders, in order.
        coefficients: One for each, of sum one.
        score: What the metric gave it in the search.
        holdout_score: What it gave on what decides at the end; None where the same decides.
        start_scores: By name ("last", "uniform", "ema 0.9"), the scores of the starts in the search.
        best: Best score after each evaluation of the search, as minimized.
    """

    checkpoints: tuple[Path, ...]
    coefficients: tuple[float, ...]
    score: float
    holdout_score: float | None
    start_scores: Mapping[str, float]
    best: tuple[float, ...]

    def config(self, **fields: Any) -> dict[str, Any]:
        """Return a linear merge of the checkpoints with these coefficients, for `merge` or a YAML file.

        Args:
            **fields: More fields of the config, such as dtype.
        """
        models = [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip(self.checkpoints, self.coefficients, strict=True)
        ]
        space = {}
        if all((folder / "adapter_model.safetensors").exists() for folder in self.checkpoints):
            space = {"space": "factors"}
        return {"merge_method": "linear", "models": models, **space, **fields}


def lcsc_search(
    checkpoints: str | Path | Sequence[str | Path],
    evaluate: Evaluate | str | None = None,
    *,
    data: str | Path | Iterable[Any] | None = None,
    holdout_evaluate: Evaluate | str | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    in_memory: bool = True,
    progress: bool = True,
    **settings: Any,
) -> LcscResult:
    """Search for the coefficients with which checkpoints combine into the best model by a metric.

    Candidates are made in memory in one model; no file is written but the state.

    Args:
        checkpoints: Folders, or a run's output folder, whose last half of checkpoints is taken (`window`).
        evaluate: Takes the model and returns a number, the same for the same weights; or its name as
            "module:function"; None for the loss on `data`.
        data: Rows, or a path, as in `Lcsc`; `holdout` says which share the search does not see.
        holdout_evaluate: Decides between the best candidates at the end; None for the held-out rows of
            `data`, or else for `evaluate`.
        model: The module that takes the weights; None to load the last checkpoint as a causal language model.
            Its weights are those of the last candidate afterwards.
        seed: Of the search.
        state: File that keeps every score, with which an interrupted search is gone on with; None for none.
        in_memory: Whether all checkpoints are held in memory, rather than read for every candidate.
        progress: Whether to show a progress bar with its estimate.
        **settings: Those of `Lcsc`.

    Raises:
        FileNotFoundError: A folder or file does not exist.
        ValueError: A setting is refused, checkpoints cannot be combined, or the state is another search's.
        ImportError: `workers` asks for Ray, which is not installed.
    """
    method = Lcsc(**Lcsc.parse(settings, "settings"))
    taken = {"metric", "data", "holdout_metric", "weight"} & set(settings)
    check(not taken, ", ".join(sorted(taken)), settings, "given by this function's own arguments")
    folders = folders_of(checkpoints)
    if isinstance(checkpoints, str | Path):
        folders = _latest(folders, method.window)
    scored, held = _metrics(method, evaluate, data, holdout_evaluate, folders)
    return _search(
        folders,
        method,
        seed,
        scored=scored,
        holdout=held,
        state=None if state is None else Path(state),
        model=model,
        in_memory=in_memory,
        progress=progress,
    )


def _metrics(
    method: Lcsc,
    evaluate: Evaluate | str | None,
    data: str | Path | Iterable[Any] | None,
    holdout: Evaluate | str | None,
    folders: Sequence[Path],
) -> tuple[Evaluate, Evaluate | None]:
    """Return what the search minimizes, and what decides at its end."""
    given = [name for name, value in (("metric", evaluate), ("data", data)) if value is not None]
    check(len(given) == 1, "metric", given, "given, or data instead: a search needs one of them")
    deciding = None if holdout is None else metric_of(holdout, "holdout_metric")
    if evaluate is not None:
        if deciding is None:
            warnings.warn(
                "no holdout_metric: the search is judged by what it was fitted to, which is too good",
                stacklevel=3,
            )
        return metric_of(evaluate), deciding
    rule = "left at False where the loss on data is minimized"
    check(not method.greater_is_better, "greater_is_better", True, rule)
    assert data is not None
    share = 0.0 if deciding is not None else method.holdout
    search, rest = evaluation_losses(data, folders[-1], share)
    return search, deciding or rest


@dataclass(frozen=True)
class _Scorer:
    """A metric on the combinations of checkpoints, turned so that lower is better."""

    candidates: Candidates
    evaluate: Evaluate
    sign: float

    def score(self, coefficients: Sequence[float]) -> float:
        found = self.candidates.score(coefficients, self.evaluate)
        return self.sign * found if math.isfinite(found) else math.inf


def _scorer(
    folders: Sequence[Path], evaluate: Evaluate, sign: float, model: nn.Module | None, in_memory: bool
) -> _Scorer:
    return _Scorer(Candidates(folders, model, in_memory=in_memory), evaluate, sign)


def _search(
    folders: Sequence[Path],
    method: Lcsc,
    seed: int,
    *,
    scored: Evaluate | None,
    holdout: Evaluate | None,
    state: Path | None,
    model: nn.Module | None = None,
    in_memory: bool = True,
    progress: bool = True,
) -> LcscResult:
    check(len(folders) >= 2, "checkpoints", [str(folder) for folder in folders], "at least two")
    if scored is None:
        scored, holdout = _metrics(method, method.metric, method.data, method.holdout_metric, folders)
    if method.workers > method.generation:
        at_once = f"{method.generation} of {method.workers} have something to do at a time"
        warnings.warn(f"workers: {at_once}; raise generation", stacklevel=3)
    sign = -1.0 if method.greater_is_better else 1.0
    own = Candidates(folders, model, in_memory=in_memory)
    try:
        log = _Log(state, _fingerprint(own, method, seed, scored, holdout))
        here = _Scorer(own, scored, sign)
        last = [0.0] * (len(folders) - 1) + [1.0]
        _warn_if_random(here, last, log)
        build = partial(_scorer, folders, scored, sign, model, in_memory)
        pool = RayActors(build, method.workers) if method.workers else InProcess(lambda: here)
        total = method.iterations + len(starts(len(folders), method.ema_rates))
        shown = None if progress else True
        try:
            with tqdm(total=total, desc="lcsc", unit="evaluations", disable=shown) as bar:
                scores = partial(log.scores, pool.scores, bar.update)
                members, start, best = method.evolution(seed).run(len(folders), scores)
        finally:
            pool.close()
        winner, decided = _decide(
            members, start.values(), None if holdout is None else _Scorer(own, holdout, sign)
        )
    finally:
        own.close()
    return LcscResult(
        checkpoints=tuple(folders),
        coefficients=winner.coefficients,
        score=sign * winner.score,
        holdout_score=None if decided is None else sign * decided,
        start_scores={name: sign * member.score for name, member in start.items()},
        best=tuple(best),
    )


def _decide(
    members: Sequence[Member], start: Iterable[Member], holdout: _Scorer | None
) -> tuple[Member, float | None]:
    """Return the winner, and what the held-out metric gave it."""
    if not math.isfinite(members[0].score):
        raise ValueError("the metric was not finite for any combination of the checkpoints")
    if holdout is None:
        return members[0], None
    finalists = {member.coefficients: member for member in [*members[:_TOP], *start]}
    again = [(holdout.score(member.coefficients), member) for member in finalists.values()]
    decided, winner = min(again, key=lambda pair: pair[0])
    if not math.isfinite(decided):
        raise ValueError("the held-out metric was not finite for any of the best combinations")
    return winner, decided


def _warn_if_random(scorer: _Scorer, last: Sequence[float], log: _Log) -> None:
    first = log.first() if log.first() is not None else scorer.score(last)
    again = scorer.score(last)
    if first != again:
        warnings.warn(
            f"the metric is not the same for the same weights ({first!r}, then {again!r}): the search would "
            "follow its noise; fix its data and its seeds",
            stacklevel=4,
        )


# State --------------------------------------------------------------------------------------------


def _fingerprint(
    candidates: Candidates, method: Lcsc, seed: int, evaluate: Evaluate, holdout: Evaluate | None
) -> str:
    settings = dataclasses.asdict(method)
    for name in _OF_NO_MATTER:
        del settings[name]
    content = [settings, seed, candidates.identity(), name_of(evaluate), name_of(holdout)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_OF_NO_MATTER = ("workers", "weight", "window", "metric", "data", "holdout_metric")


class _Log:
    """The scores of a search in their order, on the disk where a file is given.

    Args:
        path: The file, or None.
        fingerprint: Of the search that it belongs to.

    Raises:
        ValueError: The file is damaged, or belongs to another search.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self._rows: list[list[Any]] = []
        self._used = 0
        if path is not None and path.exists():
            content = read_json(path)
            fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
            rows = fields.get("evaluations")
            sound = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)
            check(sound, "state", str(path), "a file that this search has written")
            rule = "that of the same checkpoints, metric, settings and seed; delete it to search anew"
            check(fields.get("fingerprint") == fingerprint, "state", str(path), rule)
            self._rows = cast("list[list[Any]]", rows)

    def first(self) -> float | None:
        """Return the score of the first start, the last checkpoint, where it is known."""
        return _number(self._rows[0][1]) if self._rows else None

    def scores(
        self,
        evaluate: Callable[[Sequence[Sequence[float]]], Iterator[float]],
        advance: Callable[[], object],
        candidates: Sequence[tuple[float, ...]],
    ) -> Iterator[float]:
        """Yield the scores of candidates, those of an earlier process from the file."""
        known = self._rows[self._used : self._used + len(candidates)]
        for (coefficients, score), candidate in zip(known, candidates[: len(known)], strict=True):
            check(coefficients == list(candidate), "state", str(self._path), "of this version's search")
            self._used += 1
            advance()
            yield _number(score)
        rest = candidates[len(known) :]
        for candidate, score in zip(rest, evaluate(rest), strict=True):
            self._rows.append([list(candidate), score if math.isfinite(score) else None])
            self._used += 1
            if self._path is not None:
                content = {"schema": 1, "fingerprint": self._fingerprint, "evaluations": self._rows}
                write_json(self._path, content)
            advance()
            yield score


def _number(score: float | None) -> float:
    return math.inf if score is None else float(score)
