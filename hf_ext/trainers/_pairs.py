"""Which two of a prompt's scored completions make a pair, and what scores show, as functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check, check_choice

SELECTIONS = ("max_min", "max_random", "max_max", "random", "max_min_p")


@dataclass(frozen=True)
class Pairs:
    """The chosen and the rejected completion of each prompt.

    Args:
        chosen: (P,) index of the better completion.
        rejected: (P,) index of the worse one.
        margin: (P,) score of the chosen one less that of the rejected one, as the selection saw them.
        keep: (P,) whether the prompt has a pair; the other values mean nothing where it has none.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    keep: Tensor


def select_pairs(
    scores: Tensor,
    lengths: Tensor | None = None,
    *,
    selection: str = "max_min",
    length_penalty: float = 0.0,
    min_margin: float = 0.0,
    seed: int = 0,
) -> Pairs:
    """Choose a pair for each prompt; the same on every process, as ties fall to the lowest index.

    "max_min" pairs the best with the worst, "max_max" with the second best, "max_random" with the first of
    the others, "random" two at random; "max_min_p" is "max_min" of score - length_penalty * length.

    Args:
        scores: (P, n); NaN excludes a completion.
        lengths: (P, n) tokens; read by "max_min_p" alone.
        selection: One of `SELECTIONS`.
        length_penalty: Score for each token, >= 0.
        min_margin: Pairs below it are dropped, >= 0; pairs of one score always are.
        seed: Of "random".

    Raises:
        ValueError: A setting is outside its range, or there are fewer than two completions.
    """
    check_choice("pair_selection", selection, SELECTIONS)
    check(scores.ndim == 2 and scores.size(1) >= 2, "scores", tuple(scores.shape), "of shape (P, n >= 2)")
    values = scores.double()
    if selection == "max_min_p":
        if lengths is None:
            raise ValueError("lengths must be given for pair_selection 'max_min_p'")
        values = values - length_penalty * lengths.double()
    known = ~values.isnan()
    enough = known.sum(dim=1) >= 2
    best = values.masked_fill(~known, -math.inf).argmax(dim=1)
    if selection in ("max_min", "max_min_p"):
        other = values.masked_fill(~known, math.inf).argmin(dim=1)
    elif selection == "random":
        best, other = _two_at_random(values, known, seed)
    else:
        rest = known.clone()
        rest[torch.arange(len(best)), best] = False
        # The second best; or, with 1 for every one that is left, the first of them.
        ranked = values if selection == "max_max" else torch.ones_like(values)
        other = ranked.masked_fill(~rest, -math.inf).argmax(dim=1)
    margin = (values.gather(1, best[:, None]) - values.gather(1, other[:, None])).squeeze(1)
    keep = enough & (margin > 0) & (margin >= min_margin)
    return Pairs(best, other, margin, keep)


def _two_at_random(values: Tensor, known: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    keys = torch.rand(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = keys.masked_fill(~known, -1.0).topk(2, dim=1).indices
    first, second = drawn.unbind(dim=1)
    better = values.gather(1, first[:, None]) >= values.gather(1, second[:, None])
    better = better.squeeze(1)
    return torch.where(better, first, second), torch.where(better, second, first)


def best_of_n_kl(n: int) -> float:
    """Return the bound on KL(best of n || one sample) in nats: log n - (n - 1) / n.

    Raises:
        ValueError: n is below 1.
    """
    check(n >= 1, "n", n, "at least 1")
    return math.log(n) - (n - 1) / n


def round_figures(scores: Tensor, lengths: Tensor, pairs: Pairs) -> dict[str, float]:
    """Return what a round's sampling has shown.

    Args:
        scores: (P, n) rewards; NaN where there is none.
        lengths: (P, n) tokens.
        pairs: The pairs made of them.

    Returns:
        Means over prompts; those over pairs are left out where there is no pair.
    """
    known = scores[~scores.isnan()]
    keep = pairs.keep
    some = (~scores.isnan()).any(dim=1)
    figures = {
        "mean_reward": known.mean().item(),
        "top1_reward": scores[some].nan_to_num(nan=-torch.inf).amax(dim=1).mean().item(),
        "worst_reward": scores[some].nan_to_num(nan=torch.inf).amin(dim=1).mean().item(),
        "pairs": float(keep.sum()),
        "dropped": float((~keep).sum()),
        "mean_length": lengths.float().mean().item(),
    }
    if keep.any():
        for name, place in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
            length = lengths[keep].gather(1, place[keep][:, None]).float().mean().item()
            figures[f"mean_length_{name}"] = length
        figures["pair_margin"] = pairs.margin[keep].mean().item()
    return figures
