"""Pass rates of prompts under the current model, the weights made of them, and draws by weight.

Source: "PACED: Distillation at the Frontier of Student Competence" (arXiv:2603.11178): of K completions of a
prompt c pass, p = c / K, and the prompt weighs w(p) = p^alpha (1 - p)^beta; 0^0 is 1. Weights are divided by
their mean over the data, so that the learning rate keeps its meaning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler as TorchSampler

from ..core import dist
from ..core.checks import check, check_choice
from ._base import check_map
from ._rewards import call_rewards
from ._sampling import Sampler, decode_completions, end_tokens, seed_of, tokenize_prompts

logger = logging.getLogger(__name__)

ESTIMATORS = ("raw", "posterior")
# Draws of one row in an epoch, and batches of the effective size, below or above which a warning is due.
_MOST_DRAWS, _LEAST_BATCHES = 10, 4
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class PassCounts:
    """What sampling found for each of N prompts.

    Args:
        passed: (N,) int64, completions that passed.
        rollouts: (N,) int64, completions drawn.
        truncated: (N,) int64, completions that ran into the length limit.
    """

    passed: Tensor
    rollouts: Tensor
    truncated: Tensor


# Formulas ---------------------------------------------------------------------------------------------------


def pass_rates(passed: Tensor, rollouts: Tensor, estimator: str = "raw") -> Tensor:
    """Return pass rates (N,), fp64.

    Args:
        passed: (N,) completions that passed; graded ones may count in part.
        rollouts: (N,) completions drawn, at least 1 each.
        estimator: "raw", c / K, or "posterior", (c + 1) / (K + 2), which is never 0 or 1.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    passed, rollouts = passed.double(), rollouts.double()
    return passed / rollouts if estimator == "raw" else (passed + 1) / (rollouts + 2)


def beta_kernel(rates: Tensor, alpha: float, beta: float) -> Tensor:
    """Return w(p) = p^alpha (1 - p)^beta, fp64, largest at alpha / (alpha + beta); 0^0 is 1.

    Raises:
        ValueError: An exponent is negative, or a rate is NaN or outside [0, 1].
    """
    check(alpha >= 0, "paced_alpha", alpha, "at least 0")
    check(beta >= 0, "paced_beta", beta, "at least 0")
    rates = rates.double()
    wrong = (~((rates >= 0) & (rates <= 1))).nonzero().flatten().tolist()
    if wrong:
        check(False, "a pass rate", float(rates[wrong[0]]), "in [0, 1]", where=f"row {wrong[0]}")
    return rates**alpha * (1 - rates) ** beta


def paced_weights(rates: Tensor, alpha: float = 1.0, beta: float = 1.0, min_weight: float = 0.0) -> Tensor:
    """Return the weights of prompts, (N,) fp64 with mean 1.

    Args:
        rates: (N,) pass rates.
        alpha: Exponent of p; larger prefers easier prompts.
        beta: Exponent of 1 - p; larger prefers harder ones.
        min_weight: Least weight before the division by the mean.

    Raises:
        ValueError: All weights are zero.
    """
    weights = beta_kernel(rates, alpha, beta).clamp(min=min_weight)
    return mean_one(weights)


def mean_one(weights: Tensor) -> Tensor:
    """Return weights divided by their mean.

    Raises:
        ValueError: One is negative or not finite, or all are zero.
    """
    sound = torch.isfinite(weights) & (weights >= 0)
    wrong = (~sound).nonzero().flatten().tolist()
    if wrong:
        check(False, "a weight", float(weights[wrong[0]]), "finite and at least 0", where=f"row {wrong[0]}")
    if not float(weights.sum()) > 0:
        raise ValueError(
            "every prompt has the weight 0: the student passes all or none. Take more rollouts, "
            "estimator='posterior', a min_weight, or prompts of another difficulty"
        )
    return weights / weights.mean()


def effective_size(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2, how many equally weighted rows are worth as much."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def systematic_draws(weights: Tensor, offset: float) -> list[int]:
    """Return N rows drawn by systematic resampling, in row order.

    Row i is drawn floor or ceil of N w_i / sum w times, and N w_i / sum w times in the mean over offsets.

    Args:
        weights: (N,), not all zero.
        offset: In [0, 1), where the first point lies.
    """
    weights = weights.double()
    ends = weights.cumsum(0)
    points = (torch.arange(len(weights), dtype=torch.float64) + offset) * (ends[-1] / len(weights))
    last = int(weights.nonzero()[-1])  # rounding may put the last point at the very end
    return torch.searchsorted(ends, points, right=True).clamp(max=last).tolist()


def warn_of_few(weights: Tensor, batch: int) -> None:
    """Warn where few rows carry all the weight.

    Args:
        weights: (N,), mean 1.
        batch: Rows of an update.
    """
    size, most = effective_size(weights), float(weights.max())
    if size < _LEAST_BATCHES * batch:
        logger.warning(
            "the weights are worth %.1f equally weighted rows of %d, less than %d updates of %d",
            *(size, len(weights), _LEAST_BATCHES, batch),
        )
    if most > _MOST_DRAWS:
        logger.warning("one row has %.1f times the mean weight", most)


# Draws by weight --------------------------------------------------------------------------------------------


class WeightedRepeatSampler(TorchSampler):
    """Rows by weight, with replacement, each batch of an update repeated as TRL's on-policy trainers need it.

    An epoch has as many draws as there are rows, by systematic resampling, in an order of its own. Draws are
    a function of weights, seed and epoch, and so the same on every process and after a resume.

    Args:
        count: Rows.
        batch_size: Rows of an update, over processes and micro-batches.
        repeat_count: How often each batch is given.
        seed: Of the draws.
        weights_at: Gives the weights (N,) that the batch of an update, counted from 0, is drawn by.
        step: Gives the optimizer step; the pass begins in its epoch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        repeat_count: int,
        seed: int,
        weights_at: Callable[[int], Tensor],
        step: Callable[[], int],
    ) -> None:
        self.count, self.batch_size, self.repeat_count, self.seed = count, batch_size, repeat_count, seed
        self.weights_at, self.step = weights_at, step

    def __iter__(self) -> Iterator[int]:
        per_epoch = self.count // self.batch_size
        epoch = self.step() // max(per_epoch, 1)
        known: Tensor | None = None
        draws: list[int] = []
        for place in range(per_epoch):
            weights = self.weights_at(epoch * per_epoch + place)
            if known is not weights:
                known, draws = weights, self.draws(weights, epoch)
            batch = draws[place * self.batch_size : (place + 1) * self.batch_size]
            for _ in range(self.repeat_count):
                yield from batch

    def draws(self, weights: Tensor, epoch: int) -> list[int]:
        """Return the rows of an epoch in their order."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        drawn = systematic_draws(weights, offset)
        return [drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()]

    def __len__(self) -> int:
        return self.count // self.batch_size * self.batch_size * self.repeat_count


# Pass rates by sampling -------------------------------------------------------------------------------------


def estimate_pass_rates(
    sampler: Sampler,
    dataset: Any,
    reward_funcs: Any,
    *,
    rollouts: int,
    threshold: float = 1.0,
    temperature: float = 1.0,
    truncated_fails: bool = True,
    reward_weights: Sequence[float] | None = None,
    seed: int | None = None,
    chat_template_kwargs: Any = None,
    **extras: Any,
) -> PassCounts:
    """Sample completions of every prompt from the sampler's model and count those that pass (a collective).

    Each process scores a share of the rows. A completion without a reward (None or NaN) fails; an exception
    of a reward function is raised, on every process.

    Args:
        sampler: Of the model.
        dataset: Rows with `prompt`; the other columns go to the reward functions.
        reward_funcs: A function, or several, with the signature of GRPO's.
        rollouts: Completions K of each prompt, >= 2.
        threshold: Reward from which a completion passes.
        temperature: Of the sampling, > 0.
        truncated_fails: Whether a completion that ran into the length limit fails whatever its reward.
        reward_weights: Weight of each function in the sum; None for 1.
        seed: Of the draws; None for one made of the run's seed and of the optimizer step.
        chat_template_kwargs: More settings for the chat template.
        **extras: Given to the functions as they are, such as `trainer_state`.

    Raises:
        TypeError: The data set streams.
        ValueError: It has images, or `rollouts` is below 2.
    """
    check(rollouts >= 2, "rollouts", rollouts, "at least 2")
    check_map(dataset, "the data set", "a pass rate belongs to a row's number, and is of text")
    ends = set(end_tokens(sampler.trainer.model, sampler.tokenizer))
    if seed is None:
        seed = seed_of(sampler.trainer.args.seed, sampler.trainer.state.global_step)
    found: list[Tensor] = []
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        rows = dataset[start : start + _ROWS_AT_ONCE]
        ids = tokenize_prompts(sampler.tokenizer, rows["prompt"], chat_template_kwargs=chat_template_kwargs)
        names = [f"the prompt of row {start + place}" for place in range(len(ids))]
        drawn = sampler.completions(
            ids, rollouts, temperature=temperature, seed=seed_of(seed, start), names=names
        )
        share = -(-len(ids) // dist.world_size())
        mine = slice(dist.rank() * share, (dist.rank() + 1) * share)
        with dist.together():
            counted = _count(
                sampler,
                rows,
                drawn,
                mine,
                ends,
                threshold,
                truncated_fails,
                reward_funcs,
                reward_weights,
                extras,
            )
        for part in dist.gather_objects(counted.tolist()):
            found.append(torch.tensor(part, dtype=torch.int64).reshape(-1, 2))
    passed, truncated = torch.cat(found).unbind(1)
    return PassCounts(passed, torch.full_like(passed, rollouts), truncated)


def _count(
    sampler: Sampler,
    rows: Any,
    drawn: Sequence[Any],
    mine: slice,
    ends: set[int],
    threshold: float,
    truncated_fails: bool,
    reward_funcs: Any,
    reward_weights: Sequence[float] | None,
    extras: Any,
) -> Tensor:
    """Return how many completions of this process's rows passed, and were truncated, (n, 2)."""
    prompts, groups = rows["prompt"][mine], drawn[mine]
    if not prompts:
        return torch.zeros(0, 2, dtype=torch.int64)
    others = {name: values[mine] for name, values in rows.items()}
    completions = decode_completions(sampler.tokenizer, prompts, groups)
    rewards = call_rewards(
        reward_funcs,
        prompts,
        completions,
        groups,
        others,
        reward_weights=reward_weights,
        some=False,  # these rows alone may have none
        **extras,
    )
    cut = torch.tensor([[not ids or ids[-1] not in ends for ids in group] for group in groups])
    passed = rewards >= threshold  # False for NaN
    if truncated_fails:
        passed &= ~cut
    return torch.stack([passed.sum(1), cut.sum(1)], dim=1)


def counts_of_columns(dataset: Any, field: str, estimator: str) -> PassCounts | None:
    """Return the counts that a data set brings in its columns `pass_rate` and `pass_n`, or None.

    Without `pass_n` the rates are taken as they are, as of one graded completion.

    Raises:
        ValueError: A rate is outside [0, 1], or a count is below 1 or missing for the posterior.
    """
    if "pass_rate" not in dataset.column_names:
        return None
    rates = torch.tensor(dataset["pass_rate"], dtype=torch.float64)
    beta_kernel(rates, 0.0, 0.0)  # checks them
    rollouts = torch.ones_like(rates)
    if estimator == "posterior" and "pass_n" not in dataset.column_names:
        raise ValueError(f"{field} lacks the column 'pass_n', which estimator='posterior' needs")
    if "pass_n" in dataset.column_names:
        rollouts = torch.tensor(dataset["pass_n"], dtype=torch.float64)
        check(bool((rollouts >= 1).all()), f"{field}'s pass_n", float(rollouts.min()), "at least 1")
    return PassCounts(rates * rollouts, rollouts, torch.zeros_like(rates))
