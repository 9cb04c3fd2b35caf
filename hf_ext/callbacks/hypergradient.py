"""FedHyper: local training whose outer and local learning rates follow the agreement of successive updates.

Source: Wang, Wang and Li 2024, "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated
Learning with Hypergradient Descent", arXiv 2310.03156; authors' code (ATP-1010/FedHyper, no licence) for the
points below. Each process takes H local steps from common weights w to its own; D is the mean of the
differences, u_k the difference that the k-th local step makes, a(x, y) their agreement:

G:  alpha <- clip(alpha + kappa_g a(D, D_before), 1 / gamma_alpha, gamma_alpha), w <- w + alpha D.
SL: the same rule, within gamma_beta, for a factor beta of every process's learning rate in the next round.
CL: within a round, beta <- clip(beta (1 + kappa_l [a(u_k, u_{k-1}) + a(u_k, D_before) / N])), N processes.

Differs from the paper and its code:
- A displacement points downhill and a gradient uphill: products of two of either agree.
- Agreement is the cosine by default, since the products of AdamW's updates of a million weights are far
  outside the bounds at once; "raw" is the paper's.
- G is clipped as in the paper (the code: [0.2, 5]); "GM", with momentum, is the code's.
- CL multiplies, as the code does, within [1/1.1, 1.1] for one step (the code has no lower bound, and can
  reach 0); "additive" is the paper's. The first step of a round is not compared, as there is none before it.
- SL's bounds are those of a factor (the code: absolute rates).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check, check_choice
from ..core.devices import stacked
from ..core.registry import Variant
from ._base import Neutral, Run, register_callback
from ._gradients import steps_in_backward
from ._local_updates import LocalUpdatesCallback, Weights

__all__ = ["HypergradientCallback", "agreement"]

AGREEMENTS = ("cosine", "raw")
VARIANTS = ("G", "GM", "SL", "none")
STEP_LIMIT = 1.1  # of the multiplicative rule, in one step
MOMENTUM_BOUNDS = (-0.2, 4.0)  # of the agreement in GM
_NOTHING = 1e-12  # length below which a displacement has no direction


def agreement(x: Mapping[str, Tensor], y: Mapping[str, Tensor], kind: str = "cosine") -> float:
    """Return how far two displacements point the same way.

    Args:
        x: Tensors by name.
        y: Tensors of the same names and shapes.
        kind: "cosine" for <x, y> / (|x| |y|), "raw" for <x, y>.

    Returns:
        The agreement; 0 where one of them is shorter than 1e-12, or is not finite.
    """
    product, length_x, length_y = (float(_dot(a, b)) for a, b in ((x, y), (x, x), (y, y)))
    lengths = (length_x**0.5, length_y**0.5)
    if min(lengths) < _NOTHING or not all(map(math.isfinite, (product, *lengths))):
        return 0.0
    return product if kind == "raw" else product / (lengths[0] * lengths[1])


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    parts = [torch.dot(tensor.reshape(-1), y[name].reshape(-1)) for name, tensor in x.items()]
    return stacked(parts).double().sum() if parts else torch.zeros((), dtype=torch.float64)


def clip(value: float, bound: float) -> float:
    """Return a factor held between 1 / bound and bound."""
    return min(max(value, 1.0 / bound), bound)


@register_callback(
    "hypergradient",
    summary="local training whose outer and local learning rates correct themselves by how updates agree",
    paper="arXiv:2310.03156",
    supports={"local_updates"},
    neutral=Neutral(settings={"variant": "none", "local_steps": 3}, arguments={}),
    test_kwargs={"local_steps": 2, "kappa_global": 0.5},
    variants=(Variant(name="local", test_kwargs={"variant": "GM", "local": "CL", "local_steps": 4}),),
    bad_kwargs=(
        {"variant": "g"},
        {"local": "SL"},
        {"variant": "SL", "local": "CL"},
        {"agreement": "sine"},
        {"kappa_global": -0.1},
        {"kappa_local": -0.1},
        {"gamma_alpha": 1.0},
        {"gamma_beta": 0.5},
        {"cl_update": "sum"},
        {"momentum": 1.0},
        {"local_steps": 0},
        {"cl_every": 0},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class HypergradientCallback(LocalUpdatesCallback):
    """Train apart on each process for `local_steps` steps, and let agreement set the learning rates.

    On one process variant "G" is a look-ahead optimizer with a self-tuned step. Learning rates are multiplied
    around the optimizer step alone: the schedule and its log are those of the run.

    In a checkpoint, for each process: the factors, the last outer displacement (first process), and, where
    there are several processes, its weights within a round and its optimizer's state. Resuming needs as many
    processes. Within a round the model's own file holds the first process's weights.

    Args:
        variant: "G" (outer rate), "GM" (outer rate with momentum), "SL" (every local rate), "none" (mean).
        local: "CL" for local rates that each process corrects within a round (not with "SL"), or "none".
        agreement: "cosine" or "raw".
        kappa_global: Step of the outer rule, at least 0; None for 0.1, or 1 for "raw".
        kappa_local: Step of the local rule, at least 0; None as above.
        gamma_alpha: Bound of the outer factor, above 1: it stays within [1 / gamma_alpha, gamma_alpha].
        gamma_beta: Bound of the local factors, above 1.
        cl_update: "multiplicative" or "additive".
        momentum: Of GM, in [0, 1).
        cl_every: Apply CL every so many steps of a round, at least 1.
    """

    variant: str = "G"
    local: str = "none"
    agreement: str = "cosine"
    kappa_global: float | None = None
    kappa_local: float | None = None
    gamma_alpha: float = 3.0
    gamma_beta: float = 10.0
    cl_update: str = "multiplicative"
    momentum: float = 0.9
    cl_every: int = 1

    def validate(self) -> None:
        """Check the settings."""
        super().validate()
        check_choice("variant", self.variant, VARIANTS)
        check_choice("local", self.local, ("CL", "none"))
        rule = "'none' with variant 'SL': both set the local rates"
        check(self.local == "none" or self.variant != "SL", "local", self.local, rule)
        check_choice("agreement", self.agreement, AGREEMENTS)
        for name in ("kappa_global", "kappa_local"):
            value = getattr(self, name)
            check(value is None or value >= 0.0, name, value, "at least 0")
        for name in ("gamma_alpha", "gamma_beta"):
            check(getattr(self, name) > 1.0, name, getattr(self, name), "above 1")
        check_choice("cl_update", self.cl_update, ("multiplicative", "additive"))
        check(0.0 <= self.momentum < 1.0, "momentum", self.momentum, "in [0, 1)")
        check(self.cl_every >= 1, "cl_every", self.cl_every, "at least 1")

    def needs_anchor(self) -> bool:
        """Return whether a displacement of a round is looked at."""
        return self.variant != "none" or self.local == "CL"

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self.alpha = 1.0  # outer factor; for GM 1 plus the agreement
        self.server_beta = 1.0
        self.beta = 1.0  # this process's
        self.agreed = 0.0
        self._before: Weights | None = None  # the last round's displacement, for GM its running sum
        self._displacement: Weights | None = None  # for GM with CL: the last round's own
        self._last_step: Weights | None = None  # displacement of the last local step
        self._start: Weights | None = None  # weights before the local step that is being made
        self._rates: list[float] | None = None

    # Outer rule -----------------------------------------------------------------------------------

    def next_anchor(self, mean: Weights, anchor: Weights, whole: bool) -> Weights:
        """Return w + alpha D, or what the variant makes of it."""
        delta = {name: value - anchor[name] for name, value in mean.items()}
        if whole:
            self._learn(delta)
        following = self._moved(mean, delta)
        if whole:
            self._remember(delta)
        self.beta, self._last_step = 1.0, None
        return following

    def _learn(self, delta: Weights) -> None:
        if self._before is None:
            return
        kappa = _kappa(self.kappa_global, self.agreement)
        # Equal on all processes by construction; they must not part for the rounding of one.
        found = torch.tensor(agreement(delta, self._before, self.agreement), dtype=torch.float64)
        self.agreed = float(dist.broadcast_(found))
        if self.variant == "G":
            self.alpha = clip(self.alpha + kappa * self.agreed, self.gamma_alpha)
        elif self.variant == "GM":
            low, high = MOMENTUM_BOUNDS
            self.alpha = 1.0 + min(max(kappa * self.agreed, low), high)
        elif self.variant == "SL":
            self.server_beta = clip(self.server_beta + kappa * self.agreed, self.gamma_beta)

    def _moved(self, mean: Weights, delta: Weights) -> Weights:
        if self.variant not in ("G", "GM") or self.alpha == 1.0:
            return mean
        excess = self.alpha - 1.0
        for name, value in mean.items():
            value.add_(delta[name], alpha=excess)
            if self.variant == "GM" and self._before is not None:
                value.add_(self._before[name], alpha=self.momentum * excess)
        return mean

    def _remember(self, delta: Weights) -> None:
        if self.variant == "GM" and self.local == "CL":
            self._displacement = {name: value.clone() for name, value in delta.items()}
        if self.variant == "GM" and self._before is not None:
            for name, value in delta.items():
                value.add_(self._before[name], alpha=self.momentum)
        self._before = delta

    # Local rule -----------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply the learning rates for the update that is about to be made."""
        factor = self.local_factor
        if factor != 1.0:
            groups = kwargs["optimizer"].param_groups
            self._rates = [float(group["lr"]) for group in groups]
            _set_rates(groups, [rate * factor for rate in self._rates])
        if self.local == "CL":
            self._start = self.current()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the learning rates back, and let the update correct the local factor."""
        self._give_rates_back(kwargs["optimizer"].param_groups)
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        if self._start is not None and not skipped:
            now = self.current()
            self._correct({name: value - self._start[name] for name, value in now.items()})
        self._start = None

    def _correct(self, step: Weights) -> None:
        if self._last_step is not None and self.in_round % self.cl_every == 0:
            agreed = agreement(step, self._last_step, self.agreement)
            before = self._before if self._displacement is None else self._displacement
            if before is not None:
                agreed += agreement(step, before, self.agreement) / dist.world_size()
            change = _kappa(self.kappa_local, self.agreement) * agreed
            if self.cl_update == "multiplicative":
                self.beta = clip(self.beta * clip(1.0 + change, STEP_LIMIT), self.gamma_beta)
            else:
                self.beta = clip(self.beta + change, self.gamma_beta)
        self._last_step = step

    @property
    def local_factor(self) -> float:
        """What this process's learning rates are multiplied by."""
        return self.server_beta * self.beta

    def _give_rates_back(self, groups: Any) -> None:
        if self._rates is not None:
            _set_rates(groups, self._rates)
        self._rates = None

    def forget_round(self) -> None:
        """Forget the local rates."""
        self.beta, self._last_step = 1.0, None

    def undo(self) -> None:
        """Give the learning rates back, where a step was cut short, and let go of the displacements."""
        if self._optimizer is not None:
            self._give_rates_back(self._optimizer.param_groups)
        self._before = self._displacement = self._last_step = self._start = None
        super().undo()

    def begin(self, run: Run) -> None:
        """Refuse local rates that the optimizer does not look at, or the weights' type would swallow."""
        super().begin(run)
        if self.local == "CL" or self.variant == "SL":
            rule = "one that steps after the backward pass where local rates are changed for the step"
            check(not steps_in_backward(run.optimizer_name), "optim", run.optimizer_name, rule)
        if self.local == "CL":
            low = next((n for n, p in self._trained.items() if p.dtype != torch.float32), None)
            rule = "'none' unless the trained weights are fp32: steps of others are mostly rounding"
            check(low is None, "local", self.local, rule, where=str(low))

    # State ----------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return the outer factor, the mean of the local ones (a collective), and the last agreement."""
        beta = dist.all_reduce_mean_(torch.tensor(self.local_factor, dtype=torch.float64))
        return {"alpha": self.alpha, "beta_mean": float(beta), "agreement": self.agreed}

    def state_dict(self) -> dict[str, Any]:
        """Return the factors too."""
        own = {"alpha": self.alpha, "server_beta": self.server_beta, "beta": self.beta}
        return {**super().state_dict(), **own, "agreed": self.agreed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.alpha, self.server_beta, self.beta = (state[n] for n in ("alpha", "server_beta", "beta"))
        self.agreed = state["agreed"]

    def shared_state(self) -> dict[str, Weights]:
        """Return the last outer displacement, and for GM its running sum."""
        found = {"before": self._before, "displacement": self._displacement}
        return {name: weights for name, weights in found.items() if weights is not None}

    def load_shared_state(self, state: Mapping[str, Weights]) -> None:
        """Restore it."""
        self._before, self._displacement = state.get("before"), state.get("displacement")

    def own_state(self) -> dict[str, Weights]:
        """Return the displacement of the last local step."""
        return {} if self._last_step is None else {"last_step": self._last_step}

    def load_own_state(self, state: Mapping[str, Weights]) -> None:
        """Restore it."""
        self._last_step = state.get("last_step")


def _kappa(given: float | None, kind: str) -> float:
    return given if given is not None else (1.0 if kind == "raw" else 0.1)


def _set_rates(groups: Any, rates: list[float]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # which a compiled optimizer holds on to
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
