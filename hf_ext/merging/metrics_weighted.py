"""Metrics-weighted averaging: the checkpoints of one run, those with lower loss or later step counting more.

Source: Yu and Choi 2025, "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging", arXiv
2504.18580: theta = sum_i w_i theta_i, w normalized, from each checkpoint's training loss or step with one
penalty factor.

Differs from the paper: its abstract fixes the ingredients and not the formula, so the form is a choice:
u_i = L_i^-p ("power", the default), exp(-p L_i) ("softmax"), or the metric put on [0, 1] to the power p
("minmax"). Any logged metric may be taken. The factors A and B of LoRA adapters are averaged apart, as
there, where the checkpoints are of one run, and what that leaves out against the average of the updates is
reported; adapters of different runs are averaged as updates. Full checkpoints are merged as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.checks import check, check_choice
from ._base import Models, TensorInfo, choice, register_merge, setting
from ._checkpoint import Checkpoint
from ._coefficients import CoefficientMerge, expanded, folders_of, with_models
from ._config import MergeConfig, ParentConfig
from ._lora import read_adapter
from ._run_metrics import of_one_run, read_saved, step_before

if TYPE_CHECKING:
    from ._merge import MergeResult

__all__ = ["MetricsWeighted", "factor_error", "merge_run", "metrics_weights"]

_FORMS = ("power", "softmax", "minmax")
_WEIGHTINGS = ("loss", "step", "uniform")
_FLOOR = 1e-3  # what the worst checkpoint keeps under "minmax", where the best has 1
_FAR = 0.1  # relative error of averaged factors above which a warning is due


def metrics_weights(
    losses: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    *,
    weighting: str = "loss",
    penalty: float = 1.0,
    form: str = "power",
    greater_is_better: bool = False,
) -> list[float]:
    """Return the weights of checkpoints, of sum one.

    Args:
        losses: Metric of each, for weighting "loss".
        steps: Step of each, for weighting "step".
        weighting: "loss", "step" or "uniform"; the last needs one of the two lists for its length.
        penalty: Sharpness p, at least 0: 0 is the uniform average, a large one picks the best checkpoint.
        form: "power": L^-p and T^p; "softmax": exp(-p L) and exp(p T / T_max); "minmax": (1 - (L - L_min) /
            (L_max - L_min) + 0.001)^p and ((T - T_min) / (T_max - T_min) + 0.001)^p.
        greater_is_better: Whether a greater metric is better; signs are then turned.

    Raises:
        ValueError: A setting is outside its range, or the form does not fit a number.
    """
    check_choice("weighting", weighting, _WEIGHTINGS)
    check_choice("form", form, _FORMS)
    check(math.isfinite(penalty) and penalty >= 0.0, "penalty", penalty, "at least 0")
    by_step = weighting == "step"
    values = (steps if by_step else losses) if weighting != "uniform" else (losses or steps)
    name = "steps" if by_step else "losses"
    check(bool(values), name, values, f"a number for each checkpoint with weighting {weighting!r}")
    assert values is not None
    if weighting == "uniform" or penalty == 0.0:
        return [1.0 / len(values)] * len(values)
    check(all(map(math.isfinite, values)), name, list(values), "finite")
    logs = _logarithms([float(value) for value in values], name, form, by_step or greater_is_better, by_step)
    highest = max(logs)
    shares = [math.exp(penalty * (log - highest)) for log in logs]
    total = math.fsum(shares)
    return [share / total for share in shares]


def _logarithms(values: list[float], name: str, form: str, rising: bool, by_step: bool) -> list[float]:
    """Return log u_i / p of each value, which rises with it or falls."""
    sign = 1.0 if rising else -1.0
    if form == "power":
        wrong = [index for index, value in enumerate(values) if value <= 0.0]
        rule = "above 0 with form 'power'; form: softmax takes any"
        where = f"checkpoint {wrong[0] + 1}" if wrong else ""
        check(not wrong, name, values[wrong[0]] if wrong else None, rule, where=where)
        return [sign * math.log(value) for value in values]
    if form == "softmax":
        check(not by_step or max(values) > 0.0, name, values, "above 0")
        scale = max(values) if by_step else 1.0
        return [sign * value / scale for value in values]
    low, high = min(values), max(values)
    if low == high:
        return [0.0] * len(values)
    shares = [(value - low) / (high - low) for value in values]
    return [math.log((share if rising else 1.0 - share) + _FLOOR) for share in shares]


@register_merge(
    "metrics_weighted",
    summary="mean of one run's checkpoints, weighted by their loss or step",
    paper="arXiv:2504.18580",
    supports={"identity", "one_parent"},
    test_kwargs={"loss": 0.5, "step": 10.0},
    bad_kwargs=(
        {"penalty": -1.0},
        {"penalty": float("inf")},
        {"form": "cubic"},
        {"weighting": "time"},
        {"window": "first"},
        {"last": 0},
    ),
)
@dataclass(frozen=True, kw_only=True)
class MetricsWeighted(CoefficientMerge):
    """Mean of the checkpoints of one run: theta = sum_i w_i theta_i with w from their losses or steps.

    Args:
        weighting: "loss" for `metric`, "step" for the optimizer steps, or "uniform".
        penalty: Sharpness p, at least 0: 0 is the uniform average, a large one picks the best checkpoint.
        form: "power", "softmax" or "minmax"; see `metrics_weights`.
        metric: Name of the metric in the Trainer's log.
        window: "mean" of what was logged since the checkpoint before, or the "last" of it.
        greater_is_better: Whether a greater metric is better.
        last: How many of the checkpoints, the latest, are taken; None for all.
        loss: Metric of a checkpoint; left out, it is read from its trainer_state.json.
        step: Step of a checkpoint; the same.
    """

    weighting: str = choice("loss", _WEIGHTINGS)
    penalty: float = 1.0
    form: str = choice("power", _FORMS)
    metric: str = "loss"
    window: str = choice("mean", ("mean", "last"))
    greater_is_better: bool = False
    last: int | None = None
    loss: float = setting(
        math.nan, rule="a finite number", fits=lambda value: not math.isinf(value), per_parent=True
    )
    step: float = setting(
        math.nan, rule="a finite number", fits=lambda value: not math.isinf(value), per_parent=True
    )

    def validate(self) -> None:
        check(math.isfinite(self.penalty) and self.penalty >= 0.0, "penalty", self.penalty, "at least 0")
        check(self.last is None or self.last >= 1, "last", self.last, "at least 1")

    def check_models(self, models: Models) -> None:
        for tensor in models.tensors:
            if self.weighting != "uniform":
                values: list[float] = tensor.values[self.weighting]
                lacking = [label for label, v in zip(models.labels, values, strict=True) if math.isnan(v)]
                rule = "given for each model, or logged in its checkpoint"
                check(not lacking, self.weighting, ", ".join(lacking), rule, where=tensor.name)
            self.coefficients(tensor)

    def coefficients(self, tensor: TensorInfo) -> list[float]:
        return metrics_weights(
            tensor.values["loss"],
            tensor.values["step"],
            weighting=self.weighting,
            penalty=self.penalty,
            form=self.form,
            greater_is_better=self.greater_is_better,
        )

    def prepare(self, config: MergeConfig, out: Path) -> MergeConfig:
        models = expanded(config.models)
        if self.weighting != "uniform":
            models = self._with_numbers(models)
        if self.last is not None:
            models = models[-self.last :]
        if len(models) == 1:
            warnings.warn(f"{models[0].model} is the only checkpoint, and comes out unchanged", stacklevel=3)
        space = config.space
        if space == "auto" and all((Path(m.model) / "adapter_model.safetensors").exists() for m in models):
            space = self._space_of([Path(model.model) for model in models])
        if space == "factors" and len(models) > 1:
            self._warn_of_factors(models)
        return with_models(config, models, space=space)

    def _with_numbers(self, models: Sequence[ParentConfig]) -> list[ParentConfig]:
        """Return models with the numbers that their own settings lack, without those that are not finite."""
        name = self.weighting
        unread = [model for model in models if name not in {*model.parameters, *_common(self, name)}]
        folders = [Path(model.model) for model in unread]
        saved = dict(zip([model.model for model in unread], read_saved(folders), strict=True))
        kept: list[ParentConfig] = []
        for model in models:
            if model.model not in saved:
                kept.append(model)
                continue
            one = saved[model.model]
            found: dict[str, float] = {"step": float(one.step)}
            if name == "loss":
                found["loss"] = one.metric(self.metric, step_before(one, saved.values()), self.window)
                if not math.isfinite(found["loss"]):
                    text = f"{model.model} is left out: its {self.metric} is {found['loss']}"
                    warnings.warn(text, stacklevel=4)
                    continue
            parameters = {**found, **model.parameters}
            kept.append(ParentConfig(model=model.model, revision=model.revision, parameters=parameters))
        check(bool(kept), "models", [m.model for m in models], f"such that one has a finite {self.metric}")
        return kept

    def _space_of(self, folders: Sequence[Path]) -> str:
        """Return "factors" for adapters of one run, "product" for others."""
        if len(folders) == 1:
            return "factors"
        try:
            same = of_one_run(read_saved(folders))
        except FileNotFoundError:
            same = False
        if not same:
            warnings.warn(
                "these adapters are not of one run by their logs: their updates are averaged, exactly, at "
                "the sum of their ranks (set space or out_rank for another choice)",
                stacklevel=4,
            )
        return "factors" if same else "product"

    def _warn_of_factors(self, models: Sequence[ParentConfig]) -> None:
        own = [self.parse_parent(model.parameters, f"models: {model.model}") for model in models]
        info = TensorInfo("", (), 0, len(models), self.values_for("", 0.0, own))
        try:
            errors = factor_error([model.model for model in models], self.coefficients(info))
        except ValueError as error:  # factors of another kind than B A are averaged, but not compared
            warnings.warn(f"what averaging these factors leaves out is not known: {error}", stacklevel=4)
            return
        worst = max(errors, key=errors.__getitem__)
        if errors[worst] > _FAR:
            warnings.warn(
                f"averaging the factors leaves out up to {errors[worst]:.2f} of the averaged update "
                f"({worst}); space: product averages the updates themselves",
                stacklevel=4,
            )


def _common(method: MetricsWeighted, name: str) -> set[str]:
    value = getattr(method, name)
    return set() if isinstance(value, float) and math.isnan(value) else {name}


def factor_error(adapters: Sequence[str | Path], weights: Sequence[float]) -> dict[str, float]:
    """Return, by module, what averaging factors leaves out against averaging updates, relative to the latter.

    ||sum_i w_i (B_i - B)(A_i - A)||_F / ||sum_i w_i B_i A_i||_F with B and A the averages. It is of second
    order in the distance of the checkpoints: small along one run, of any size between runs.

    Args:
        adapters: Folders of LoRA adapters.
        weights: One for each, of sum one.

    Raises:
        ValueError: A folder holds no plain LoRA.
    """
    checkpoints = [Checkpoint(folder) for folder in adapters]
    try:
        found = [read_adapter(checkpoint) for checkpoint in checkpoints]
        return {
            module: _gap([adapter.factors(module) for adapter in found], weights)
            for module in found[0].modules
        }
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()


def _gap(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> float:
    left = torch.stack([b.double() for b, _ in pairs])  # (N, out_features, r)
    right = torch.stack([a.double() for _, a in pairs])  # (N, r, in_features)
    shares = torch.tensor(list(weights), dtype=torch.float64)[:, None, None]
    b, a = (shares * left).sum(0), (shares * right).sum(0)
    whole = _norm(shares * left, right)
    return _norm(shares * (left - b), right - a) / whole if whole else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    """Return the Frobenius norm of sum_i left_i right_i, without forming it."""
    b = left.permute(1, 0, 2).flatten(1)  # (out_features, N r)
    a = right.flatten(0, 1)  # (N r, in_features)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


def merge_run(
    run: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    dtype: str | None = None,
    space: str = "auto",
    out_rank: int | None = None,
    **settings: Any,
) -> MergeResult:
    """Merge the checkpoints of a run by their metrics into a folder that `from_pretrained` loads.

    Args:
        run: The run's output folder, with its checkpoint-<step> folders, or some of these.
        out: The folder to write.
        overwrite: Whether an earlier merge there may be replaced.
        progress: Whether to show a progress bar.
        dtype: Stored type; None for that of the checkpoints.
        space: For adapters "factors" or "product"; "auto" for factors where the checkpoints are of one run.
        out_rank: Rank of the merged LoRA in product space.
        **settings: Those of `MetricsWeighted`.

    Returns:
        The `MergeResult`; its manifest holds loss and step of each checkpoint.

    Raises:
        FileNotFoundError: There is no such run, or a checkpoint lacks its trainer_state.json.
        ValueError: The checkpoints or settings are refused; the text says why.
    """
    from ._merge import merge

    folders = folders_of(run)
    content: dict[str, Any] = {
        "merge_method": "metrics_weighted",
        "models": [str(folder) for folder in folders],
        "parameters": settings,
        "dtype": dtype,
        "space": space,
        "out_rank": out_rank,
    }
    return merge(content, out, overwrite=overwrite, progress=progress)
