"""AlignDistil: distillation onto a teacher that is extrapolated from a DPO model away from a reverse one.

Source: "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation"
(arXiv:2503.02832): the theorem that a token-level reward beta log(pi_d / pi_r) with a KL penalty equals
distillation onto a combination of logits, and the token-adaptive strength. With the logits z_d of the DPO
model and z_r of the one trained by DPO on swapped pairs, at each token

    D = sum_v |pi_d(v) - pi_r(v)|        w = eta D + floor        z* = z_d + w (z_d - z_r)
    loss = (beta / w) KL(pi_student || softmax(z* / temperature)).

A completion's loss is the mean over its tokens, a batch's the mean over completions.

Differs from the paper as its published scripts do: D is not halved, and a floor of 1e-3 is added to w.
Differs from the scripts: the first token of a sampled completion counts (they drop it), and `temperature`
divides the student's logits in both forms (the off-policy script divides the teacher's alone; they are the
same at 1, which both ship). D is that of the models at temperature 1. The strength of the constant forms is a
field of its own, `ad_weight`. `reverse_model` is the reference policy for "theorem1" and "theorem1_adaptive",
which extrapolate from it: z* = z_r + w (z_d - z_r). Vocabularies of different sizes are refused, also where
the difference is padding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import (
    DistillationConfig,  # pyright: ignore[reportPrivateImportUsage]
    DistillationTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from ..core.checks import check, check_choice
from ..core.registry import Variant
from ._base import Inputs, MethodTrainer, Neutral, check_columns, register_trainer
from ._distillation import Target, TargetDistillationTrainer

__all__ = [
    "AlignDistilConfig",
    "AlignDistilTrainer",
    "disagreement",
    "extrapolated_logits",
    "reverse_preferences",
]

logger = logging.getLogger(__name__)

TEACHER_TYPES = ("aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive", "gkd")


@dataclass
class AlignDistilConfig(DistillationConfig):
    """Settings of `AlignDistilTrainer`, over those of TRL's distillation.

    The paper's scripts use learning_rate 1e-6, one epoch, batches of 128 and a warm-up of a tenth.

    Args:
        on_policy: Whether the student samples the completions; if not, they are the column `chosen` (or
            `completion`), cut to `max_completion_length`.
        teacher_type: "aligndistil" and "theorem1_adaptive" have a strength w of each token, "theorem1" and
            "theorem1_contrast" the constant `ad_weight`; "gkd" is plain distillation from the DPO model.
        ad_beta: beta of the DPO runs, > 0; scales the loss.
        ad_eta: Strength for each unit of disagreement, >= 0; None for 10, or 15 with `on_policy`.
        ad_floor: Added to the strength, > 0; at 0 a token without disagreement would weigh without bound, so
            0 needs `scale_by_beta=False`.
        ad_weight: Strength of the constant forms, > 0.
        scale_by_beta: Whether a token's loss has the factor beta / w: agreement ties it to the DPO model.
        token_weight_cap: Upper bound of beta / w, > 0, or None.
        max_teacher_gap: The target's logits are raised to at least this much below the largest, > 0, which
            bounds the loss; None for no bound.
        loss_reduction: "sequence", the mean of completions' means, or "token", the mean over tokens.

    Raises:
        ValueError: A field is outside its range, or `beta` is not 1.
    """

    on_policy: bool = field(default=False, metadata={"help": "Whether the student samples completions."})
    teacher_type: str = field(default="aligndistil", metadata={"help": "How the teacher is made."})
    ad_beta: float = field(default=0.1, metadata={"help": "beta of the DPO runs."})
    ad_eta: float | None = field(
        default=None, metadata={"help": "Strength per disagreement; None: 10 or 15."}
    )
    ad_floor: float = field(default=1e-3, metadata={"help": "Added to the strength."})
    ad_weight: float = field(default=1.0, metadata={"help": "Strength of the constant forms."})
    scale_by_beta: bool = field(default=True, metadata={"help": "Whether the factor beta / w is kept."})
    token_weight_cap: float | None = field(default=None, metadata={"help": "Upper bound of beta / w."})
    max_teacher_gap: float | None = field(default=None, metadata={"help": "Largest gap of target logits."})
    loss_reduction: str = field(default="sequence", metadata={"help": "'sequence' or 'token'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta == 1.0, "beta", self.beta, "1: the divergence is KL(student || teacher)")
        check_choice("teacher_type", self.teacher_type, TEACHER_TYPES)
        check(self.ad_beta > 0, "ad_beta", self.ad_beta, "positive")
        check(self.ad_eta is None or self.ad_eta >= 0, "ad_eta", self.ad_eta, "at least 0, or None")
        low = self.ad_floor > 0 or (self.ad_floor == 0 and not self.scale_by_beta)
        check(low, "ad_floor", self.ad_floor, "positive (0 needs scale_by_beta=False)")
        check(self.ad_weight > 0, "ad_weight", self.ad_weight, "positive")
        for name in ("token_weight_cap", "max_teacher_gap"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "positive, or None")
        check_choice("loss_reduction", self.loss_reduction, ("sequence", "token"))
        if self.adaptive and self.eta == 0 and self.scale_by_beta:
            logger.warning(
                "ad_eta=0 with scale_by_beta=True multiplies every token's loss by ad_beta / ad_floor = %g",
                self.ad_beta / self.ad_floor,
            )

    @property
    def eta(self) -> float:
        """The strength for each unit of disagreement in use."""
        if self.ad_eta is not None:
            return self.ad_eta
        return 15.0 if self.on_policy else 10.0

    @property
    def adaptive(self) -> bool:
        """Whether the strength is a token's own."""
        return self.teacher_type in ("aligndistil", "theorem1_adaptive")


def disagreement(dpo_logits: Tensor, reverse_logits: Tensor) -> Tensor:
    """Return D = sum_v |pi_d(v) - pi_r(v)|, (n,) in [0, 2], for logits (n, V)."""
    return (dpo_logits.softmax(-1) - reverse_logits.softmax(-1)).abs().sum(-1)


def extrapolated_logits(
    dpo_logits: Tensor,
    reverse_logits: Tensor,
    strength: Tensor,
    teacher_type: str = "aligndistil",
    max_gap: float | None = None,
) -> Tensor:
    """Return the teacher's logits (n, V).

    Args:
        dpo_logits: (n, V), of the DPO model.
        reverse_logits: (n, V), of the reverse DPO model; of the reference for the two forms of theorem 1.
        strength: w, (n,).
        teacher_type: As in the config.
        max_gap: Lowest logit below the largest, or None.
    """
    if teacher_type == "gkd":
        logits = dpo_logits
    else:
        start = reverse_logits if teacher_type in ("theorem1", "theorem1_adaptive") else dpo_logits
        logits = start + strength[:, None] * (dpo_logits - reverse_logits)
    if max_gap is not None:
        logits = logits.maximum(logits.amax(-1, keepdim=True) - max_gap)
    return logits


def reverse_preferences(dataset: Any) -> Any:
    """Return preference pairs with `chosen` and `rejected` swapped, to train the reverse DPO model on.

    Args:
        dataset: A `datasets.Dataset`, its streamed form, or a dictionary of splits.

    Raises:
        ValueError: A column is missing.
    """
    splits: Any = dataset.items() if isinstance(dataset, dict) else [("dataset", dataset)]
    for name, rows in splits:
        check_columns(rows, ("chosen", "rejected"), name)
    swapped: Any = dataset
    return swapped.rename_columns({"chosen": "rejected", "rejected": "chosen"})


@register_trainer(
    "aligndistil",
    summary="distillation onto a DPO model, extrapolated token by token away from a reverse DPO model",
    title="AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
    paper="arXiv:2503.02832",
    config=AlignDistilConfig,
    inputs=Inputs(
        columns=(("prompt", "chosen"), ("prompt", "completion"), ("prompt",)),
        models={"dpo_model": True, "reverse_model": False},
    ),
    neutral=Neutral(
        parent=DistillationTrainer,
        config=DistillationConfig,
        settings={"on_policy": True, "teacher_type": "gkd", "loss_reduction": "token"},
        parent_settings={"beta": 1.0},
        models={"dpo_model": "teacher_model"},
    ),
    test_kwargs={"ad_eta": 10.0},
    bad_kwargs=(
        {"teacher_type": "dpo"},
        {"ad_beta": 0.0},
        {"ad_eta": -1.0},
        {"ad_floor": 0.0},
        {"ad_weight": 0.0},
        {"token_weight_cap": 0.0},
        {"max_teacher_gap": -1.0},
        {"loss_reduction": "sum"},
        {"beta": 0.5},
    ),
    variants=(Variant(name="on_policy", test_kwargs={"on_policy": True, "loss_reduction": "token"}),),
)
class AlignDistilTrainer(MethodTrainer, TargetDistillationTrainer):
    """TRL's DistillationTrainer onto a teacher made of two DPO models.

    Metrics: `ad/mean_w`, `ad/tvd` (D / 2), `ad/token_weight` and `ad/token_weight_max`; and, of the updates
    that are logged, `ad/expected_reward` and `ad/dpo_expected_reward` (the token's mean of
    beta log(pi_d / pi_r) under the student and under the DPO model), `ad/kl_to_dpo`, `ad/kl_to_reverse`.

    Args:
        model: As TRL's.
        dpo_model: In the place of TRL's `teacher_model`: the model trained by DPO; or the name of a frozen
            adapter of `model`.
        reverse_model: The model trained by DPO on `reverse_preferences`; or the name of a frozen adapter. May
            be left out for "gkd" only.
        args: Settings.
        *positional: TRL's further arguments.
        **keywords: TRL's further arguments.

    Raises:
        ValueError: `reverse_model` is missing; see also `TargetDistillationTrainer`.
    """

    args: AlignDistilConfig

    def __init__(
        self,
        model: Any,
        dpo_model: Any = None,
        args: Any = None,
        *positional: Any,
        reverse_model: Any = None,
        **keywords: Any,
    ) -> None:
        if dpo_model is None:
            raise ValueError("dpo_model is missing: the teacher is extrapolated from it")
        plain = args is not None and getattr(args, "teacher_type", "") == "gkd"
        if reverse_model is None and not plain:
            raise ValueError("reverse_model is missing; only teacher_type='gkd' does without")
        more = {"reverse_model": reverse_model}
        self._compared = False
        super().__init__(
            model,
            dpo_model,
            args,
            *positional,
            more_teachers=more,
            teacher_field="dpo_model",
            **keywords,
        )

    @classmethod
    def completion_sources(cls, args: Any) -> tuple[str, ...]:
        return ("student",) if args.on_policy else ("dataset",)

    def loss_reduction(self) -> str:
        return self.args.loss_reduction

    def composes(self) -> bool:
        return self.args.teacher_type != "gkd"

    def target(self, teachers: Sequence[Tensor], student: Tensor) -> Target:
        args, (dpo, reverse) = self.args, teachers
        apart = disagreement(dpo, reverse)
        strength = (
            args.eta * apart + args.ad_floor if args.adaptive else torch.full_like(apart, args.ad_weight)
        )
        self._warn_of_equal_models(apart)
        weights = None
        metrics = {"ad/mean_w": strength, "ad/tvd": apart / 2}
        if args.scale_by_beta:
            weights = args.ad_beta / strength
            if args.token_weight_cap is not None:
                weights = weights.clamp(max=args.token_weight_cap)
            metrics |= {"ad/token_weight": weights, "ad/token_weight_max": weights}
        if self._is_logged():
            metrics |= diagnostics(dpo.log_softmax(-1), reverse.log_softmax(-1), student, args.ad_beta)
        logits = extrapolated_logits(dpo, reverse, strength, args.teacher_type, args.max_teacher_gap)
        return Target(logits, weights, metrics)

    def _is_logged(self) -> bool:
        if not self.model.training:
            return True
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps), 1)
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _warn_of_equal_models(self, apart: Tensor) -> None:
        if self._compared or not len(apart):
            return
        self._compared = True
        if not bool(apart.any()):
            logger.warning(
                "dpo_model and reverse_model give the same probabilities; the teacher is the DPO model alone"
            )


def diagnostics(dpo: Tensor, reverse: Tensor, student: Tensor, beta: float) -> dict[str, Tensor]:
    """Return what a token earns and how far the student is from both models, (n,) each.

    Args:
        dpo: Log-probabilities (n, V) of the DPO model.
        reverse: Of the reverse model.
        student: Of the student.
        beta: Factor of the reward.
    """
    reward, p = beta * (dpo - reverse), student.exp()
    return {
        "ad/expected_reward": (p * reward).sum(-1),
        "ad/dpo_expected_reward": (dpo.exp() * reward).sum(-1),
        "ad/kl_to_dpo": (p * (student - dpo)).sum(-1),
        "ad/kl_to_reverse": (p * (student - reverse)).sum(-1),
    }
