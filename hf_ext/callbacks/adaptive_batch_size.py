"""Adaptive batch size: the effective batch grows when the noise of the gradient asks for it.

Source: Lau, Liu and Kolar 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", arXiv
2402.11215. With g the gradient of a batch of B samples and V1, V2, V3 the variances of `_gradient_noise`, the
tests ask for a batch of V1 / (eta^2 |g|^2) (norm test), V2 / (theta^2 |g|^4) (inner-product test), or the
larger of that and V3 / (nu^2 |g|^2) (augmented test). Where it is above B, it is the next update's batch.

Differs from the paper:
- Variances come from micro-batches, not from the gradients of single samples, which are too expensive in a
  language model; see `_gradient_noise`. The authors' code also sums V2 and V3 by parameter tensor; the
  definitions are over all parameters at once, and so are these.
- The batch grows in whole multiples of the settings' batch, and never beyond `batch_max` or an epoch.
- The coordinate-wise test asks for an unbounded batch where a coordinate's mean is near zero. Here the
  quotients are taken for whole parameter tensors, and their 0.9-quantile decides.
- With `metric="preconditioned"` squares are divided by Adam's sqrt(v) + eps, in all tests.
- The rate can be raised with the batch (`scale_lr`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import dist
from ..core.checks import check, check_choice
from ._base import Neutral, Run, register_callback
from ._gradient_noise import Noise, NoiseMeter, adam_divisor
from ._macro_batches import MacroBatch, MacroBatchCallback

__all__ = ["AdaptiveBatchSizeCallback", "grown_batch", "required_batch"]

TESTS = ("norm", "inner_product", "augmented", "coordinate")
QUANTILE = 0.9
MOST_SAMPLES = 1e18


def required_batch(
    noise: Noise, test: str = "norm", *, eta: float = 0.1, theta: float = 0.1, nu: float = 0.1
) -> float:
    """Return the batch, in samples, in which the noise would pass a test.

    Args:
        noise: Statistics with a gradient that is not zero.
        test: "norm", "inner_product", "augmented" or "coordinate"; the second and third need V2.
        eta: Tolerance of the norm tests, above 0.
        theta: That of the inner-product tests.
        nu: That of the augmented test's other half.
    """
    if test == "coordinate":
        there = noise.tensor_norms > 0.0
        quotients = noise.tensor_variances[there] / noise.tensor_norms[there]
        return float(quotients.quantile(QUANTILE)) / eta / eta
    by_norm = noise.variance / noise.squared_norm / eta / eta
    if test == "norm":
        return by_norm
    assert noise.along is not None
    assert noise.across is not None
    by_product = noise.along / noise.squared_norm**2 / theta / theta
    if test == "inner_product":
        return by_product
    return max(by_product, noise.across / noise.squared_norm / nu / nu)


def grown_batch(batch: int, required: float, batch_max: int, growth_cap: float | None = None) -> int:
    """Return the next update's batch, in samples; never below the present one.

    Args:
        batch: B.
        required: What a test asks for.
        batch_max: Largest batch.
        growth_cap: Largest factor of growth; None for any.
    """
    limit = float(batch_max) if growth_cap is None else min(batch_max, batch * growth_cap)
    return max(batch, math.ceil(min(required, limit)))


@register_callback(
    "adaptive_batch_size",
    summary="an effective batch that grows when the noise of the gradient asks for it",
    paper="arXiv:2402.11215",
    neutral=Neutral(settings={"batch_max": 64, "test_interval": 1000}, arguments={}),
    test_kwargs={
        "batch_max": 24,
        "batch_start": 8,
        "eta": 0.5,
        "test_interval": 2,
        "growth_cap": 1.5,
        "budget": "updates",
    },
    bad_kwargs=(
        {"batch_max": 0},
        {"batch_max": 64, "batch_start": 0},
        {"batch_max": 64, "batch_start": 65},
        {"batch_max": 64, "test": "gradient"},
        {"batch_max": 64, "eta": 0.0},
        {"batch_max": 64, "theta": -1.0},
        {"batch_max": 64, "nu": 0.0},
        {"batch_max": 64, "test_interval": 0},
        {"batch_max": 64, "growth_cap": 1.0},
        {"batch_max": 64, "budget": "tokens"},
        {"batch_max": 64, "scale_lr": 1.5},
        {"batch_max": 64, "metric": "fisher"},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class AdaptiveBatchSizeCallback(MacroBatchCallback):
    """Let the effective batch grow with the noise of the gradient, up to a largest one; it never shrinks.

    The batch of the settings (micro-batch x accumulation x processes) is the unit: an update uses a whole
    number of them, run one after another, so that memory does not grow with the batch. With
    `budget="samples"` a run uses the samples that it would have used without the callback, in fewer updates,
    and learning rates follow the samples; `save_steps` and the like count updates, and so come rarer.

    A test costs one buffer of the gradients' size, nine with inner products, and one norm for each
    micro-batch. Updates between tests, and at the largest batch, cost nothing.

    In a checkpoint: the batch, the place in the data, the samples used, the last test's demand, and the
    learning rate's clock.

    Args:
        batch_max: Largest effective batch in samples, at least the first; rounded down to whole units.
        batch_start: First effective batch in samples, whole units; None for one.
        test: "norm", "inner_product", "augmented" or "coordinate".
        eta: Tolerance of the norm and coordinate tests, above 0; smaller grows earlier.
        theta: Tolerance of the inner-product and augmented tests, above 0.
        nu: Tolerance of the augmented test at right angles to the gradient, above 0.
        test_interval: Updates between tests, at least 1.
        growth_cap: Largest factor that one test lets the batch grow by (rounded up to whole units), above 1;
            None for any.
        budget: "samples": the run ends, and learning rates fall, by samples. "updates": by updates, with as
            many passes over the data as they need.
        scale_lr: p in (B / B_start)^p, a factor of the learning rate, in [0, 1]; 0 is none.
        metric: "euclidean", or "preconditioned" by Adam's second moments.
    """

    batch_max: int
    batch_start: int | None = None
    test: str = "norm"
    eta: float = 0.1
    theta: float = 0.1
    nu: float = 0.1
    test_interval: int = 1
    growth_cap: float | None = None
    budget: str = "samples"
    scale_lr: float = 0.0
    metric: str = "euclidean"

    def validate(self) -> None:
        """Check the settings."""
        check(self.batch_max >= 1, "batch_max", self.batch_max, "at least 1")
        rule = f"in [1, batch_max = {self.batch_max}]"
        check(
            self.batch_start is None or 1 <= self.batch_start <= self.batch_max,
            "batch_start",
            self.batch_start,
            rule,
        )
        check_choice("test", self.test, TESTS)
        for name in ("eta", "theta", "nu"):
            check(0.0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        check(self.test_interval >= 1, "test_interval", self.test_interval, "at least 1")
        cap = self.growth_cap
        check(cap is None or cap > 1.0, "growth_cap", cap, "above 1")
        check_choice("budget", self.budget, ("samples", "updates"))
        check(0.0 <= self.scale_lr <= 1.0, "scale_lr", self.scale_lr, "in [0, 1]")
        check_choice("metric", self.metric, ("euclidean", "preconditioned"))

    # The batch ------------------------------------------------------------------------------------

    def factors(self, unit: int) -> tuple[int, int]:
        """Return the first and the largest multiple of the settings' batch."""
        where = "micro-batch x accumulation x processes"
        check(self.batch_max >= unit, "batch_max", self.batch_max, f"at least {unit}", where=where)
        start = unit if self.batch_start is None else self.batch_start
        check(start % unit == 0, "batch_start", start, f"a multiple of {unit}", where=where)
        return start // unit, self.batch_max // unit

    def counts_samples(self) -> bool:
        """Return whether the run is measured in samples."""
        return self.budget == "samples"

    def scales_rate(self) -> bool:
        """Return whether the learning rate rises with the batch."""
        return self.scale_lr > 0.0

    def rate_scale(self) -> float:
        """Return (B / B_start)^p."""
        return (self.factor / self.first_factor) ** self.scale_lr

    # The test -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self._required = 0.0
        self._meter: NoiseMeter | None = None
        self._halved = False  # whether the update is of one micro-batch
        self._splits = False  # whether these data are known to have rows to cut

    def begin(self, run: Run) -> None:
        """Check that the noise can be measured."""
        super().begin(run)
        self._sharded = bool(self.trainer.accelerator.is_fsdp2 and self.trainer.is_fsdp_enabled)
        self._parameters = [p for p in run.model.parameters() if p.requires_grad]
        self._adam = getattr(run.optimizer, "optimizer", run.optimizer)
        if self.metric == "preconditioned":
            rule = f"'euclidean' with {run.optimizer_name}, which has no second moments of Adam's"
            check(all("betas" in group for group in self._adam.param_groups), "metric", self.metric, rule)
        if self.factor < self.largest_factor and self._halves(self.factor * self.geometry.accumulation):
            rows = self.geometry.rows
            check(rows >= 2, "per_device_train_batch_size", rows, "at least 2, or the update of two batches")

    def undo(self) -> None:
        """Let go of the run's gradients and parameters."""
        super().undo()
        self._meter, self._parameters, self._adam = None, [], None

    def begin_update(self, batches: Sequence[Any], items: Any) -> None:
        """Decide whether this update is tested: one of full size, with labels and with room for growth."""
        self._meter = None
        if self.factor == self.largest_factor:
            return
        self._halved = self._halves(self.update_size)
        full = self.update_size == self.factor * self.geometry.accumulation
        whole = full and self._is_whole(batches, items)
        if (self.trainer.state.global_step + 1) % self.test_interval != 0:
            return
        empty = items is not None and float(items) == 0.0  # no share of nothing
        left_out = torch.tensor([float(not whole or empty)], dtype=torch.float64)
        if float(dist.all_reduce_sum_(left_out)) > 0.0:  # on any process
            return
        divisor: Callable[[Any], Tensor] | None = None
        if self.metric == "preconditioned":
            divisor = adam_divisor(self._adam)
            if divisor is None:  # before Adam's first step
                return
        self._meter = NoiseMeter(
            self._parameters,
            sharded=self._sharded,
            micro_batches=2 if self._halved else self.update_size,
            products=self.test in ("inner_product", "augmented"),
            divisor=divisor,
        )
        self._shares_sum = 0.0

    def gathers_groups(self) -> bool:
        """With FSDP2 a tested update reduces every micro-batch, which the Trainer's earlier groups do not."""
        return self._meter is not None and self._sharded

    def run_group(self, run: Callable[[Any], Tensor], model: Any, group: MacroBatch, items: Any) -> Tensor:
        """Run a group; in a tested update, look at each micro-batch's gradient."""
        if self._meter is None:
            return super().run_group(run, model, group, items)
        if self._halved:
            group = MacroBatch(half for batch in group for half in halves(batch, self.geometry.rows))
        total = self._zero()
        for batch in group:
            part = len(next(iter(batch.values()))) / self.geometry.rows if self._halved else 1.0
            share = self._share(batch, items, part)
            if self._halved:
                self.trainer.current_gradient_accumulation_steps = 1.0 / part
            self._meter.set_aside()
            with contextlib.nullcontext() if self._sharded else self.trainer.accelerator.no_sync(model):
                total = total + run(batch)
            self._meter.take(share)
            self._shares_sum += share
        if self.group_ends_update:
            self._meter.reduce()
            self._decide()
        return total

    def _share(self, batch: Any, items: Any, part: float) -> float:
        """Return a micro-batch's share of the whole batch's loss, as the Trainer weights it.

        Args:
            batch: The micro-batch.
            items: `num_items_in_batch`.
            part: Its size over that of an ordinary one.
        """
        trainer, world = self.trainer, self.geometry.world
        if not self._by_items(items):
            share = part / (self.update_size * world)
        else:
            if items is None:
                raise ValueError(
                    f"{type(trainer).__name__} scales its loss by itself and counts no items: the share of a "
                    "micro-batch is not known, and the noise of the gradient cannot be measured"
                )
            across = trainer.args.average_tokens_across_devices and world > 1
            share = self._own_items(batch) / (float(items) * (1 if across else world))
        if self._sharded:
            share = float(dist.all_reduce_sum_(torch.tensor([share], dtype=torch.float64)))
        return share

    def _by_items(self, items: Any) -> bool:
        """Return whether the Trainer leaves it to the loss to divide by a count of items.

        Args:
            items: `num_items_in_batch`.
        """
        trainer = self.trainer
        if trainer.loss_is_scaled_for_ga is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        by_model = trainer.model_accepts_loss_kwargs and items is not None
        return by_model or trainer.compute_loss_func is not None

    def _halves(self, micro_batches: int) -> bool:
        """Return whether an update of so many micro-batches on each process has to be cut to have a noise."""
        return micro_batches * (1 if self._sharded else self.geometry.world) == 1

    def _is_whole(self, batches: Sequence[Any], items: Any) -> bool:
        """Return whether a full update is not to be halved, or can be.

        Raises:
            ValueError: Updates of these data cannot be; an epoch's last batch is not asked.
        """
        plan = self.geometry
        if not self._halved:
            return True
        if not self._splits and self._used + self.update_size != plan.length:
            steps = self.trainer.args.gradient_accumulation_steps
            rule = (
                "at least 2, or batch_start two micro-batches, where the loss is not divided by a count of "
            )
            rule += "items: its halves are not the whole"
            check(self._by_items(items), "gradient_accumulation_steps", steps, rule)
            halves(batches[0], plan.rows)
            self._splits = True
        return self._splits and len(next(iter(batches[0].values()))) == plan.rows

    def _own_items(self, batch: Any) -> float:
        """Return the items of a micro-batch on this process, counted as the Trainer counts them."""
        trainer = self.trainer
        across = trainer.args.average_tokens_across_devices
        trainer.args.average_tokens_across_devices = False  # else it sums over processes
        try:
            return float(trainer._get_num_items_in_batch([batch], trainer.args.device))
        finally:
            trainer.args.average_tokens_across_devices = across

    def _decide(self) -> None:
        assert self._meter is not None
        noise = self._meter.finish(self.batch)
        self._meter = None
        whole = torch.tensor([self._shares_sum], dtype=torch.float64)
        whole = float(whole if self._sharded else dist.all_reduce_sum_(whole))
        if abs(whole - 1.0) > 1e-3:
            raise ValueError(
                f"the micro-batches of an update make up {whole:.4g} of its loss, by the items that "
                f"{type(self.trainer).__name__} counts: the noise of the gradient cannot be measured"
            )
        if noise is None or not noise.usable:
            return
        required = required_batch(noise, self.test, eta=self.eta, theta=self.theta, nu=self.nu)
        required = min(required, MOST_SAMPLES)  # which a checkpoint can hold
        decision = torch.tensor([required], dtype=torch.float64)
        self._required = required = float(dist.broadcast_(decision))
        batch = grown_batch(self.batch, required, self.batch_max, self.growth_cap)
        self.factor = max(self.factor, min(math.ceil(batch / self.geometry.unit), self.largest_factor))

    # State ----------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return too what the last test asked for, in samples (0 before it) and over the next batch."""
        return {**super().scalars(), "required": self._required, "ratio": self._required / self.batch}

    def state_dict(self) -> dict[str, Any]:
        """Return the batch, the place in the data and the last test's demand."""
        return {**super().state_dict(), "required": self._required}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self._required = state["required"]


def halves(batch: Any, rows: int) -> list[dict[str, Any]]:
    """Return a batch's first and second half.

    Args:
        batch: Tensors, or lists, of one row for each sample.
        rows: Samples that it should hold, at least 2.

    Raises:
        ValueError: Something in it has another number of rows, so that it cannot be cut by samples.
    """
    middle = rows // 2
    parts: list[dict[str, Any]] = [{}, {}]
    for name, value in batch.items():
        length = len(value) if isinstance(value, Tensor | list) and not _is_scalar(value) else None
        if length != rows:
            raise ValueError(
                f"an update of one micro-batch cannot be tested: its {name!r} is not {rows} rows to cut in "
                "two. Use gradient_accumulation_steps=2, or a batch_start of two micro-batches"
            )
        parts[0][name], parts[1][name] = value[:middle], value[middle:]
    return parts


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
