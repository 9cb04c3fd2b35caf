"""Accelerated preference optimization: rounds of DPO or SPPO with a Nesterov step of the weights between.

Source: "Accelerated Preference Optimization for Large Language Model Alignment" (arXiv:2410.06293), Algorithm
1: after round t, which trains theta_hat_{t+1} from theta_t with theta_t as the reference, the next policy is

    theta_{t+1} = theta_hat_{t+1} + alpha (theta_hat_{t+1} - theta_hat_t),      theta_hat_0 = theta_0,

the form in parameters of pi_{t+1} ~ pi_hat_{t+1} (pi_hat_{t+1} / pi_hat_t)^alpha. The difference is one of
trained points, never of extrapolated ones; with exact inner solutions T rounds go as far as about
T / (1 - alpha) of iterative DPO's. Sampling, scoring and pairing are those of online iterative DPO.

Differs from the paper in nothing that it states; which of the last two points it scores is not stated
(`final`). TRL's losses "apo_zero" and "apo_down" are Anchored Preference Optimization, another method.

An adapter's tensors are not extrapolated, as its update is a product of them: the merged weights are, each
round then starts a fresh adapter, and the run returns the whole update as one LoRA adapter of the original
base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..core import dist
from ..core.checks import check, check_choice
from ..core.files import read_tensors, write_tensors
from ._base import Inputs, register_trainer, zero_stage
from ._folding import (
    WholeLayers,
    as_lora,
    base_weights,
    folded_layers,
    fresh_adapter,
    merged_weights,
    refuse_data_start,
)
from ._parts import own_part, part_of_whole, put_part, sum_over_parts, whole_tensors
from ._rounds import RoundsConfig, RoundsTrainer
from ._snapshots import reshard

__all__ = ["APOConfig", "APOTrainer", "extrapolate", "momentum_sum"]

logger = logging.getLogger(__name__)


def extrapolate(hat: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """Return hat + alpha (hat - previous), computed in fp32 and rounded once; hat itself where alpha is 0.

    Args:
        hat: The point that has just been trained.
        previous: The one trained before it, of the same shape.
        alpha: The coefficient, in [0, 1).
    """
    if alpha == 0:
        return hat
    wide = torch.promote_types(hat.dtype, torch.float32)
    point = hat.to(wide)
    return (point + alpha * (point - previous.to(wide))).to(hat.dtype)


def momentum_sum(alpha: float, rounds: int) -> float:
    """Return how many rounds of iterative DPO a number of rounds is worth, with exact inner solutions.

    It is the sum of (1 - alpha^k) / (1 - alpha) over rounds k, and counts the trained point of the last one.
    """
    return sum((1 - alpha**k) / (1 - alpha) for k in range(1, rounds + 1))


@dataclass
class APOConfig(RoundsConfig):
    """Settings of `APOTrainer`, over those of rounds; see `RoundsConfig`.

    Args:
        extrapolation_alpha: alpha in [0, 1); 0 is online iterative DPO.
        max_extrapolation_ratio: Longest extrapolation, as a share of the weights' norm, > 0; None for any.
        extrapolate_modules: Regular expression of the tensors to extrapolate; None for all that train.
        final: What the run returns: "extrapolated", or "hat" for the point trained last.

    Raises:
        ValueError: A setting is outside its range.
    """

    extrapolation_alpha: float = field(default=0.3, metadata={"help": "Coefficient of the step; 0 for none."})
    max_extrapolation_ratio: float | None = field(
        default=None, metadata={"help": "Longest step, as a share of the weights' norm."}
    )
    extrapolate_modules: str | None = field(
        default=None, metadata={"help": "Regular expression of the tensors to extrapolate."}
    )
    final: str = field(default="extrapolated", metadata={"help": "'extrapolated' or 'hat'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, ratio = self.extrapolation_alpha, self.max_extrapolation_ratio
        check(0 <= alpha < 1, "extrapolation_alpha", alpha, "in [0, 1)")
        check(ratio is None or ratio > 0, "max_extrapolation_ratio", ratio, "positive, or None")
        check_choice("final", self.final, ("extrapolated", "hat"))
        if self.extrapolate_modules is not None:
            try:
                re.compile(self.extrapolate_modules)
            except re.error as error:
                raise ValueError(f"extrapolate_modules is no regular expression: {error}") from error
        if self.num_rounds == 1 and self.final == "hat":
            logger.warning("one round with final='hat' is plain DPO: nothing is extrapolated")


@register_trainer(
    "apo",
    summary="iterative DPO whose rounds go further by a Nesterov step of the weights between them",
    title="Accelerated Preference Optimization for Large Language Model Alignment",
    paper="arXiv:2410.06293",
    config=APOConfig,
    inputs=Inputs(columns=(("prompt",),), reward=True, test_columns=(("prompt", "chosen", "rejected"),)),
    neutral=None,
    supports={"generates", "rounds"},
    test_kwargs={"num_rounds": 2, "num_candidates": 3, "kl_prompts": 2},
    bad_kwargs=(
        {"extrapolation_alpha": 1.0},
        {"extrapolation_alpha": -0.1},
        {"max_extrapolation_ratio": 0.0},
        {"extrapolate_modules": "("},
        {"final": "last"},
    ),
)
class APOTrainer(RoundsTrainer):
    """Rounds of DPO with extrapolated weights between them; arguments as `RoundsTrainer`.

    With `loss_type="sppo_hard"` the rounds are SPPO's. `output_dir/round_*/hat.safetensors` holds the trained
    points of the last two rounds, beside the extrapolated `policy.safetensors`.

    Raises:
        ValueError: The weights that train are not fp32 (their difference over a round is below the resolution
            of bf16); or an adapter starts from data, or is combined with what its folding excludes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._whole_layers: WholeLayers | None = None
        self._gave_back = False
        self._original: dict[str, Tensor] | None = None
        super().__init__(*args, **kwargs)
        self._opposed = 0
        self._set_up()

    def _set_up(self) -> None:
        """Check what is extrapolated, and keep the weights that adapters will be folded into."""
        model = self._unwrapped()
        if self.args.extrapolation_alpha == 0 or self._original is not None:
            return
        folds = isinstance(model, PeftModel)
        rule = "called once where FSDP2 shards the model: its new adapter is not sharded"
        check(not self._gave_back, "train", "called again", rule)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if folds:
            refuse_data_start(model)
            weights = dict(base_weights(folded_layers(model)))
        coarse = sorted({str(p.dtype) for p in weights.values()} - {"torch.float32"})
        rule = "torch.float32 (in a recipe `dtype: float32`); bf16=True computes in bf16"
        # Half precision of DeepSpeed is that of the model alone, not of the policies.
        check(not coarse or self.rounds_weights(), "the dtype of the weights to extrapolate", coarse, rule)
        if folds:
            half = str(self._deepspeed().dtype()) if self.rounds_weights() else None
            rule = "none with an adapter: it rounds the base that each round's adapter is folded into"
            check(half is None, "DeepSpeed's bf16 or fp16", half, rule)
            reference, reset = self.args.reference, self.args.reset_optimizer
            check(reference == "round_start", "reference", reference, "'round_start' with an adapter")
            check(reset, "reset_optimizer", reset, "True with an adapter: each round has a fresh one")
            self._shard()
            self._original = {path: own_part(w) for path, w in self._base().items()}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run all rounds; see `RoundsTrainer.train`."""
        self._set_up()  # a run before has given its adapter back
        return super().train(*args, **kwargs)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _shard(self) -> None:
        model = self._unwrapped()
        folds = self.args.extrapolation_alpha > 0 and isinstance(model, PeftModel)
        sharded = self.is_fsdp_enabled or zero_stage(self) == 3
        if sharded and folds and self._whole_layers is None:
            self._whole_layers = WholeLayers(model)
        super()._shard()

    def _base(self) -> dict[str, nn.Parameter]:
        """Return the base weights that adapters are folded into."""
        model = self._unwrapped()
        reshard(model)
        return base_weights(folded_layers(model))

    # Policies -------------------------------------------------------------------------------------

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains and, where adapters are folded, the base weights under them."""
        found = super().policy_parameters()
        if self._original is not None:
            found |= {f"base.{path}": weight for path, weight in self._base().items()}
        return found

    def load_policy(self, state: Mapping[str, Tensor]) -> None:
        """Write a policy's tensors; an adapter is made anew on its base, as its start depends on it."""
        if self._original is not None:
            for path, weight in self._base().items():
                put_part(weight, state[f"base.{path}"])
            self._renew_adapter()
        super().load_policy(state)

    def _renew_adapter(self) -> None:
        model, seed = self._unwrapped(), self.args.seed + 1000 * self.round
        if self._whole_layers is not None:
            self._whole_layers.fresh_adapter(model, seed)
            return
        fresh_adapter(model, seed)
        self.model_wrapped = self.model  # a wrapper would still hold the old adapter's gradients

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that are extrapolated, or into which adapters are folded."""
        if self._original is None:
            return super().policy_parameters()
        return self._base()

    def _read_point(self, path: Path) -> dict[str, Tensor]:
        point, weights = read_tensors(path), self._weights()
        differing = sorted(point.keys() ^ weights.keys())
        check(not differing, f"tensors of {path}", differing[:1], "those of the model in training")
        return {name: part_of_whole(point[name], weight, name) for name, weight in weights.items()}

    def _point(self) -> dict[str, Tensor]:
        """Return copies of the weights that are extrapolated, on the CPU; of sharded ones their parts."""
        model = self._unwrapped()
        if self._original is None:
            return super().policy_state()
        if self._whole_layers is not None:
            reshard(model)
            return self._whole_layers.merged_weights(model)
        return {path: w.cpu() for path, w in merged_weights(model, folded_layers(model)).items()}

    # Rounds ---------------------------------------------------------------------------------------

    def begin_rounds(self, run: Path, last: int) -> None:
        """Read the point that was trained last; before the first round it is the model as given."""
        if self.args.extrapolation_alpha > 0:
            path = run / f"round_{last}" / "hat.safetensors"
            self._hat = self._read_point(path) if last >= 0 else self._point()
            self._step: dict[str, Tensor] | None = None

    def end_round(self, before: Mapping[str, Tensor], folder: Path, *, trained: bool) -> dict[str, float]:
        """Extrapolate; a round without pairs is no trained point and moves nothing."""
        alpha = self.args.extrapolation_alpha
        if alpha == 0:
            return {}
        hat = self._point()
        whole = whole_tensors(hat, self._weights())
        dist.on_main(lambda: write_tensors(folder / "hat.safetensors", whole))
        previous, self._hat = self._hat, hat
        if not trained:
            return {}
        chosen = self.args.extrapolate_modules
        named = [name for name in hat if chosen is None or re.search(chosen, name)]
        check(bool(named), "extrapolate_modules", chosen, "the expression of some tensor that trains")
        step = {name: hat[name] - previous[name] for name in named}
        size, weight = self._norm(step), self._norm({name: hat[name] for name in named})
        figures = {"apo/step_norm": size, "apo/cos": self._cosine(step)}
        limit = self.args.max_extrapolation_ratio
        if limit is not None and alpha * size > limit * weight:
            alpha = limit * weight / size
        figures["apo/extrapolation_norm"] = alpha * size
        self._step = step
        new = {
            name: extrapolate(hat[name], previous[name], alpha) if name in step else hat[name] for name in hat
        }
        with dist.together():
            broken = [name for name, value in new.items() if not value.isfinite().all()]
            check(not broken, "the extrapolated weights", f"not finite in {broken[:1]}", "finite")
        self._write_point(new)
        return {name: value for name, value in figures.items() if value == value}

    def _cosine(self, step: Mapping[str, Tensor]) -> float:
        if self._step is None:
            return float("nan")
        products = {name: (step[name].double() * old.double()).sum() for name, old in self._step.items()}
        dot = sum_over_parts(products, self._weights())
        cosine = dot / max(self._norm(step) * self._norm(self._step), 1e-30)
        self._opposed = self._opposed + 1 if cosine < 0 else 0
        if self._opposed >= 2:
            logger.warning(
                "the steps of the last rounds point against each other (cosine %.2f): the momentum works "
                "against the data; lower extrapolation_alpha or learning_rate",
                cosine,
            )
        return cosine

    def _write_point(self, point: Mapping[str, Tensor]) -> None:
        if self._original is None:
            super().load_policy(point)
            return
        for path, weight in self._base().items():
            put_part(weight, point[path])
        self._renew_adapter()

    def after_rounds(self, run: Path) -> None:
        """Put the chosen point into the model; with a folded adapter, as a LoRA of the original base."""
        if self.args.extrapolation_alpha == 0:
            return
        if self._original is None:
            if self.args.final == "hat":
                super().load_policy(self._hat)
            return
        final = self._hat if self.args.final == "hat" else self._point()
        folded, split = self._unwrapped(), zero_stage(self) == 3
        reshard(folded)
        if split:
            self._end_engine()
        self.model = as_lora(folded, self._original, final)
        if isinstance(folded, FSDPModule):
            folded.unshard()  # what is sharded with the outermost module, which is no longer called
        self.model_wrapped, self.optimizer = self.model, None
        self.callback_handler.model = cast(Any, self.model)
        self._original, self._gave_back = None, self.is_fsdp_enabled
        if split:
            self._whole_layers = None
            self._split()

    def _norm(self, tensors: Mapping[str, Tensor]) -> float:
        squares = {name: value.double().square().sum() for name, value in tensors.items()}
        return sum_over_parts(squares, self._weights()) ** 0.5
