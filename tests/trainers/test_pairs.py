"""Selection of pairs: the values of the specification, ties, gaps, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_ext.trainers import best_of_n_kl, select_pairs
from hf_ext.trainers._pairs import SELECTIONS

NAN = math.nan


def chosen_of(scores: list[float], selection: str, **settings: float) -> tuple[int, int] | None:
    pairs = select_pairs(torch.tensor([scores]), selection=selection, **settings)  # type: ignore[arg-type]
    return (int(pairs.chosen[0]), int(pairs.rejected[0])) if pairs.keep[0] else None


@pytest.mark.parametrize(
    ("selection", "expected"), [("max_min", (1, 3)), ("max_max", None), ("max_random", (1, 0))]
)
def test_the_pairs_of_one_row_of_scores(selection: str, expected: tuple[int, int] | None) -> None:
    assert chosen_of([0.1, 0.7, 0.7, -0.2], selection) == expected


def test_a_length_penalty_turns_the_pair_around() -> None:
    scores, lengths = torch.tensor([[1.0, 0.9]]), torch.tensor([[5, 2]])
    plain = select_pairs(scores, lengths, selection="max_min_p", length_penalty=0.0)
    assert (plain.chosen.item(), plain.rejected.item()) == (0, 1)
    penalized = select_pairs(scores, lengths, selection="max_min_p", length_penalty=0.1)
    assert (penalized.chosen.item(), penalized.rejected.item()) == (1, 0)
    assert penalized.margin.item() == pytest.approx(0.2)  # 0.7 - 0.5


def test_max_max_takes_the_second_best() -> None:
    assert chosen_of([0.1, 0.9, 0.5, -0.2], "max_max") == (1, 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_scores_that_are_all_equal_give_no_pair(selection: str) -> None:
    pairs = select_pairs(torch.full((3, 4), 0.5), torch.ones(3, 4), selection=selection)
    assert not pairs.keep.any()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_candidate_without_a_score_is_in_no_pair(selection: str) -> None:
    scores = torch.tensor([[NAN, 0.2, 0.9, NAN], [0.1, NAN, NAN, NAN], [NAN] * 4, [0.3, 0.1, NAN, 0.2]])
    pairs = select_pairs(scores, torch.ones(4, 4), selection=selection)
    assert pairs.keep.tolist() == [True, False, False, True]
    for row in (0, 3):
        assert scores[row, pairs.chosen[row]] > scores[row, pairs.rejected[row]]


def test_ties_fall_to_the_lowest_index() -> None:
    assert chosen_of([0.5, 0.1, 0.5, 0.1], "max_min") == (0, 1)


def test_pairs_below_the_margin_are_dropped() -> None:
    assert chosen_of([0.5, 0.3], "max_min", min_margin=0.1) == (0, 1)
    assert chosen_of([0.5, 0.3], "max_min", min_margin=0.3) is None


def test_random_pairs_depend_on_the_seed_alone_and_reach_every_candidate() -> None:
    scores = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    first, again = (select_pairs(scores, selection="random", seed=5) for _ in range(2))
    assert torch.equal(first.chosen, again.chosen)
    assert not torch.equal(first.chosen, select_pairs(scores, selection="random", seed=6).chosen)
    assert (first.margin > 0).all()
    assert set(first.chosen.tolist()) == {0, 1, 2, 3}
    # Two of four at random: each candidate is in half of the pairs.
    used = torch.bincount(torch.cat([first.chosen, first.rejected]), minlength=4)
    assert ((used - 100).abs() < 30).all()


@pytest.mark.parametrize(("n", "bound"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (8, 1.204442)])
def test_bound_on_the_divergence_of_the_best_of_n(n: int, bound: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(bound, abs=1e-6)


def test_the_bound_is_reached_by_a_reward_without_ties() -> None:
    # KL of the best of n over many equally likely outcomes, each with its own reward.
    n, outcomes = 4, 20000
    edges = torch.linspace(0, 1, outcomes + 1, dtype=torch.float64)
    best = edges[1:] ** n - edges[:-1] ** n
    assert (best * (best * outcomes).log()).sum().item() == pytest.approx(best_of_n_kl(n), abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "settings", "name"),
    [
        (torch.zeros(2, 1), {}, "scores"),
        (torch.zeros(3), {}, "scores"),
        (torch.zeros(2, 2), {"selection": "best"}, "pair_selection"),
        (torch.zeros(2, 2), {"selection": "max_min_p"}, "lengths"),
    ],
)
def test_bad_input_is_named(scores: Tensor, settings: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        select_pairs(scores, **settings)  # type: ignore[arg-type]
