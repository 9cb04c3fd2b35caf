"""PACED: distillation that weighs each problem by how often the student solves it.

Source: "PACED: Distillation at the Frontier of Student Competence" (arXiv:2603.11178): K completions of each
problem are sampled from the student and verified; with the pass rate p a problem weighs p^alpha (1 - p)^beta,
by default p (1 - p), divided by its mean over the data. Two stages: KL(teacher || student) on reference
completions, then KL(student || teacher) on the student's own, with pass rates taken again in between.

Differs from the paper: the weights set how often a problem is drawn (`apply="sampling"`, the same expectation
and no teacher forward for problems without weight) or multiply its loss (`apply="loss"`). Both stages are one
run with one learning-rate schedule; the optimizer begins the second one afresh (`reset_optimizer`). A reward
function counts as the verifier. An exception that it raises is raised; a completion without a reward fails.
In self-distillation the teacher is the model that training starts from, shown more than the student (the
column `teacher_prompt`, such as the problem with its solution), and there is reverse KL alone.
The weights are never taken from completions that trained. With rates that give every problem the weight 0,
the run does not begin; found so later, the former weights stay, with a warning, so that no work is lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler as TorchSampler
from transformers import TrainerCallback
from trl import (
    DistillationConfig,  # pyright: ignore[reportPrivateImportUsage]
    DistillationTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from ..core.checks import check, check_choice
from ..core.registry import Variant
from ._base import Inputs, MethodTrainer, Neutral, check_map, register_trainer
from ._distillation import ROW, TEACHER_PROMPT, TargetDistillationTrainer, shows_teacher_more
from ._pass_rates import (
    ESTIMATORS,
    PassCounts,
    WeightedRepeatSampler,
    counts_of_columns,
    effective_size,
    estimate_pass_rates,
    mean_one,
    paced_weights,
    pass_rates,
    warn_of_few,
)
from ._rewards import check_rewards
from ._sampling import Sampler, SamplingSettings

__all__ = ["PacedDistillationConfig", "PacedDistillationTrainer", "paced_weights", "pass_rates"]

logger = logging.getLogger(__name__)


@dataclass
class PacedDistillationConfig(DistillationConfig):
    """Settings of `PacedDistillationTrainer`, over those of TRL's distillation.

    TRL's `beta` is the divergence of the second stage; 1, its default, is KL(student || teacher).

    Args:
        paced_alpha: Exponent of the pass rate, >= 0; larger prefers easier problems.
        paced_beta: Exponent of the failure rate, >= 0; larger prefers harder problems. Both at 0: no weights,
            and no sampling for them.
        rollouts: Completions K sampled of each problem, >= 2.
        pass_rate_temperature: Of that sampling, > 0.
        success_threshold: Reward from which a completion passes.
        truncated_fails: Whether a completion that ran into `max_completion_length` fails whatever its reward.
        reward_weights: Weight of each reward function in the sum; None for 1.
        rollout_batch_size: Completions sampled at once on a process, >= 1.
        estimator: "raw", c / K, or "posterior", (c + 1) / (K + 2), which gives every problem some weight.
        min_weight: Least weight before the division by the mean, >= 0.
        apply: "sampling" draws problems by weight, "loss" multiplies their loss.
        stage_split: Share of the updates in the first stage, from 0 (the second alone) to 1 (it alone).
        refresh_every: Updates after which pass rates are taken again, >= 1; None for at the switch only.
        reset_optimizer: Whether the second stage begins with fresh moments.
        loss_reduction: "token", the mean over tokens, or "sequence", the mean of completions' means.

    Raises:
        ValueError: A field is outside its range.
    """

    paced_alpha: float = field(default=1.0, metadata={"help": "Exponent of the pass rate."})
    paced_beta: float = field(default=1.0, metadata={"help": "Exponent of the failure rate."})
    rollouts: int = field(default=8, metadata={"help": "Completions sampled of each problem."})
    pass_rate_temperature: float = field(default=1.0, metadata={"help": "Temperature of that sampling."})
    success_threshold: float = field(default=1.0, metadata={"help": "Reward from which one passes."})
    truncated_fails: bool = field(default=True, metadata={"help": "Whether a truncated completion fails."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function."}
    )
    rollout_batch_size: int = field(default=32, metadata={"help": "Completions sampled at once."})
    estimator: str = field(default="raw", metadata={"help": "'raw' or 'posterior'."})
    min_weight: float = field(default=0.0, metadata={"help": "Least weight of a problem."})
    apply: str = field(default="sampling", metadata={"help": "'sampling' or 'loss'."})
    stage_split: float = field(default=0.5, metadata={"help": "Share of updates in the first stage."})
    refresh_every: int | None = field(default=None, metadata={"help": "Updates between pass rates."})
    reset_optimizer: bool = field(default=True, metadata={"help": "Fresh moments for the second stage."})
    loss_reduction: str = field(default="token", metadata={"help": "'token' or 'sequence'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("paced_alpha", "paced_beta", "min_weight"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(self.rollouts >= 2, "rollouts", self.rollouts, "at least 2")
        heat = self.pass_rate_temperature
        check(heat > 0, "pass_rate_temperature", heat, "positive: equal completions tell nothing of a rate")
        check(math.isfinite(self.success_threshold), "success_threshold", self.success_threshold, "finite")
        check(self.rollout_batch_size >= 1, "rollout_batch_size", self.rollout_batch_size, "at least 1")
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("apply", self.apply, ("sampling", "loss"))
        check(0 <= self.stage_split <= 1, "stage_split", self.stage_split, "in [0, 1]")
        every = self.refresh_every
        check(every is None or every >= 1, "refresh_every", every, "at least 1, or None")
        check_choice("loss_reduction", self.loss_reduction, ("token", "sequence"))

    def sampling_settings(self) -> SamplingSettings:
        """Return how completions are drawn for the pass rates; vLLM's engine is the trainer's own."""
        return SamplingSettings(
            max_new_tokens=self.max_completion_length or 512,
            temperature=self.pass_rate_temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            batch_size=self.rollout_batch_size,
            cache_implementation=self.cache_implementation,
            generation_kwargs=self.generation_kwargs,  # pyright: ignore[reportArgumentType] - parsed by TRL
        )


class _Steps(TrainerCallback):
    """Calls the trainer when the run begins and after each update, before the checkpoint of that update."""

    def __init__(self, trainer: PacedDistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the first pass rates."""
        self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch stages and take pass rates again where they are due."""
        self.trainer.advance()


@register_trainer(
    "paced_distillation",
    summary="distillation on the problems that the student sometimes solves, forward then reverse KL",
    title="PACED: Distillation at the Frontier of Student Competence",
    paper="arXiv:2603.11178",
    config=PacedDistillationConfig,
    inputs=Inputs(
        columns=(("prompt", "completion"), ("prompt", "chosen"), ("prompt",)),
        models={"teacher_model": True},
        reward=True,
        reward_optional=True,  # rows may bring their pass rates or weights
    ),
    neutral=Neutral(
        parent=DistillationTrainer,
        config=DistillationConfig,
        settings={"paced_alpha": 0.0, "paced_beta": 0.0, "stage_split": 0.0, "apply": "loss"},
        models={"teacher_model": "teacher_model"},
    ),
    supports={"generates", "draws_by_process"},
    test_kwargs={"rollouts": 4, "success_threshold": 0.35, "truncated_fails": False},
    bad_kwargs=(
        {"paced_alpha": -1.0},
        {"paced_beta": -0.5},
        {"rollouts": 1},
        {"pass_rate_temperature": 0.0},
        {"success_threshold": float("nan")},
        {"reward_weights": [1.0, 2.0]},
        {"rollout_batch_size": 0},
        {"estimator": "mean"},
        {"min_weight": -1.0},
        {"apply": "both"},
        {"stage_split": 1.5},
        {"refresh_every": 0},
        {"loss_reduction": "sum"},
    ),
    variants=(
        Variant(name="loss", test_kwargs={"apply": "loss", "refresh_every": 2, "min_weight": 0.01}),
        Variant(name="refreshed", test_kwargs={"refresh_every": 1, "estimator": "posterior"}),
    ),
)
class PacedDistillationTrainer(MethodTrainer, TargetDistillationTrainer):
    """TRL's DistillationTrainer in two stages, on problems weighted by the student's pass rate.

    The rates come from `reward_funcs`, or from the data: `sample_weight` is used as it is and for the whole
    run; `pass_rate` (with `pass_n` for the posterior) gives the first weights, and without `reward_funcs`
    those of the whole run.

    With `apply="sampling"` an epoch has as many draws as there are rows. New weights apply from the first
    batch that is not fetched yet: one update later, and a few more with workers that fetch ahead. With
    `apply="loss"` they apply at once, and a batch's loss is divided by its tokens, whatever their weights.

    Metrics: `paced/stage`, `paced/mean_pass_rate`, `paced/frac_zero` and `paced/frac_one` (of problems that
    no or every completion passed), `paced/frac_truncated` and `paced/ess`, the rows that the weights are
    worth.

    In a checkpoint: the weights in use and the update from which each table applies.

    Args:
        model: As TRL's.
        teacher_model: As TRL's; or the name of a frozen adapter of `model`. None for self-distillation of an
            adapter: its base is the teacher.
        args: Settings.
        train_dataset: Rows with `prompt`, and with `completion` or `chosen` for the first stage; with
            `teacher_prompt` the teacher, whichever it is, is shown that in the place of `prompt`.
        eval_dataset: As `train_dataset`.
        *positional: TRL's further arguments.
        reward_funcs: The verifier: a function, or several, with the signature of GRPO's.
        **keywords: TRL's further arguments.

    Raises:
        TypeError: The data set streams and is to be weighted.
        ValueError: Nothing gives pass rates; see also `TargetDistillationTrainer`.
    """

    args: PacedDistillationConfig

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        reward_funcs: Any = None,
        **keywords: Any,
    ) -> None:
        args = PacedDistillationConfig("PacedDistillation-output") if args is None else args
        if teacher_model is None:
            _check_self_distillation(args, train_dataset)
        self.reward_funcs = None
        if reward_funcs is not None:
            self.reward_funcs = check_rewards(reward_funcs, args.reward_weights)
        self.weighted = _is_weighted(args, train_dataset, self.reward_funcs)
        if self.weighted and args.apply == "loss":
            if ROW in train_dataset.column_names:
                train_dataset = train_dataset.remove_columns(ROW)
            train_dataset = train_dataset.add_column(ROW, list(range(len(train_dataset))))
        self._tables: list[tuple[int, Tensor]] = []
        self._figures: dict[str, float] = {}
        self._restored = False
        super().__init__(model, teacher_model, args, train_dataset, eval_dataset, *positional, **keywords)
        self._sampler: Sampler | None = None
        if self.weighted and self.reward_funcs is not None:
            self._sampler = Sampler(self, args.sampling_settings())
            if args.use_vllm:
                self._sampler.vllm = self.vllm_generation
        self.add_callback(_Steps(self))

    # Stages ---------------------------------------------------------------------------------------

    @classmethod
    def completion_sources(cls, args: Any) -> tuple[str, ...]:
        return (("dataset",) if args.stage_split > 0 else ()) + (("student",) if args.stage_split < 1 else ())

    def completion_source(self) -> str:
        return "dataset" if self.stage() == 1 else "student"

    def divergence(self) -> float:
        return 0.0 if self.stage() == 1 else self.args.beta

    def loss_reduction(self) -> str:
        return self.args.loss_reduction

    def switch_step(self) -> int:
        """Return the first update, from 0, of the second stage."""
        return round(self.args.stage_split * self.state.max_steps)

    def stage(self) -> int:
        """Return the stage of the coming update, 1 or 2; in evaluation that of the last one."""
        if self.args.stage_split in (0, 1):
            return 1 if self.args.stage_split == 1 else 2
        done = self.state.global_step
        update = done if self.model.training else max(done - 1, 0)
        return 1 if not self.state.max_steps or update < self.switch_step() else 2

    def begin(self) -> None:
        """Take the first weights, unless they came from a checkpoint."""
        if self.weighted and not self._restored:
            weights, self._figures = self._weights(first=True)
            self._tables = [(0, weights)]
        self._restored = False

    def advance(self) -> None:
        """Do what is due after an update: the switch of stages, new pass rates."""
        step, args = self.state.global_step, self.args
        if step >= self.state.max_steps:
            return
        switches = 0 < step == self.switch_step()
        if switches and args.reset_optimizer:
            self.optimizer.state.clear()
        refreshes = args.refresh_every is not None and step % args.refresh_every == 0
        if self._sampler is not None and not self._is_fixed() and (switches or refreshes):
            try:
                weights, self._figures = self._weights(first=False)
            except ValueError as error:
                logger.warning("update %d: the former weights stay: %s", step, error)
                return
            active = [place for place, (start, _) in enumerate(self._tables) if start <= step]
            self._tables = [*self._tables[active[-1] if active else 0 :], (step + self._delay(), weights)]

    # Weights --------------------------------------------------------------------------------------

    def _is_fixed(self) -> bool:
        return "sample_weight" in self.train_dataset.column_names

    def _weights(self, *, first: bool) -> tuple[Tensor, dict[str, float]]:
        """Return the weights of the training rows (N,), fp64 with mean 1, and figures for the log."""
        args, rows = self.args, self.train_dataset
        figures: dict[str, float] = {}
        if self._is_fixed():
            weights = mean_one(torch.tensor(rows["sample_weight"], dtype=torch.float64))
        else:
            counts = counts_of_columns(rows, "train_dataset", args.estimator) if first else None
            counts = self._estimate() if counts is None else counts
            rates = pass_rates(counts.passed, counts.rollouts, args.estimator)
            figures = {
                "paced/mean_pass_rate": float((counts.passed / counts.rollouts).double().mean()),
                "paced/frac_zero": float((counts.passed == 0).double().mean()),
                "paced/frac_one": float((counts.passed == counts.rollouts).double().mean()),
                "paced/frac_truncated": float(counts.truncated.sum() / counts.rollouts.sum()),
            }
            weights = paced_weights(rates, args.paced_alpha, args.paced_beta, args.min_weight)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        warn_of_few(weights, batch * self.accelerator.num_processes)
        return weights, {**figures, "paced/ess": effective_size(weights)}

    def _estimate(self) -> PassCounts:
        assert self._sampler is not None
        args, rows = self.args, self.train_dataset
        return estimate_pass_rates(
            self._sampler,
            rows.remove_columns(ROW) if ROW in rows.column_names else rows,
            self.reward_funcs,
            rollouts=args.rollouts,
            threshold=args.success_threshold,
            temperature=args.pass_rate_temperature,
            truncated_fails=args.truncated_fails,
            reward_weights=args.reward_weights,
            chat_template_kwargs=self.chat_template_kwargs,
            trainer_state=self.state,
        )

    def _delay(self) -> int:
        """Return the updates whose batches are fetched before new weights can count."""
        if self.args.apply == "loss":
            return 0
        ahead = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
        return math.ceil((1 + ahead) / self.args.gradient_accumulation_steps)

    def weights_at(self, update: int) -> Tensor:
        """Return the weights (N,) of an update, counted from 0."""
        found = [weights for start, weights in self._tables if start <= update]
        return found[-1] if found else self._tables[0][1]

    def row_weights(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if not self.weighted or self.args.apply != "loss" or not self.model.training:
            return None
        return self.weights_at(self.state.global_step)[[row[ROW] for row in rows]]

    def _get_train_sampler(self, dataset: Any = None) -> TorchSampler:
        if not self.weighted or self.args.apply != "sampling":
            return super()._get_train_sampler(dataset)
        args = self.args
        return WeightedRepeatSampler(
            len(self.train_dataset if dataset is None else dataset),
            args.per_device_train_batch_size
            * self.accelerator.num_processes
            * args.gradient_accumulation_steps,
            args.gradient_accumulation_steps,
            args.seed,
            self.weights_at,
            lambda: self.state.global_step,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            for name, value in {"paced/stage": self.stage(), **self._figures}.items():
                self._metrics["train"][name].append(value)
        return super()._generate_and_score_completions(inputs)

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the tables of weights (T, N), the update from which each applies, and the log's figures."""
        if not self.weighted:
            return {}
        rows = torch.stack([weights for _, weights in self._tables]) if self._tables else torch.zeros(0, 0)
        return {"starts": [start for start, _ in self._tables], "weights": rows, "figures": self._figures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: The training data have another number of rows.
        """
        held, count = state["weights"].double(), len(self.train_dataset)
        check(held.size(1) == count, "train_dataset", count, f"of {held.size(1)} rows, as in the checkpoint")
        self._tables = list(zip(state["starts"], held.unbind(0), strict=True))
        self._figures = dict(state["figures"])
        self._restored = True


def _check_self_distillation(args: PacedDistillationConfig, dataset: Any) -> None:
    """Raise unless a run without a teacher is one of self-distillation.

    Raises:
        ValueError: It shows its teacher nothing more, or is not of reverse KL alone.
    """
    if not shows_teacher_more(dataset):
        raise ValueError(
            f"teacher_model is missing: it is left out for self-distillation only, whose train_dataset has a "
            f"column {TEACHER_PROMPT!r} with what the teacher is shown"
        )
    rule = "in self-distillation: KL(student || teacher) alone"
    check(args.stage_split == 0, "stage_split", args.stage_split, f"0 {rule}")
    check(args.beta == 1, "beta", args.beta, f"1 {rule}")


def _is_weighted(args: PacedDistillationConfig, dataset: Any, reward_funcs: Any) -> bool:
    """Return whether rows are to be weighted.

    Raises:
        TypeError: The data set streams.
        ValueError: Nothing gives weights, or nothing gives them again.
    """
    names = getattr(dataset, "column_names", None) or []
    if "sample_weight" not in names and args.paced_alpha == 0 and args.paced_beta == 0:
        return False
    check_map(dataset, "train_dataset", "its rows are weighted by what is sampled of their text")
    if reward_funcs is None and not {"sample_weight", "pass_rate"} & set(names):
        raise ValueError(
            "reward_funcs is missing: pass rates need a verifier, or a column 'pass_rate' or 'sample_weight'"
        )
    fixed = args.refresh_every is not None and (reward_funcs is None or "sample_weight" in names)
    check(not fixed, "refresh_every", args.refresh_every, "None where the data give the weights")
    return True
