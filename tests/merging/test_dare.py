"""Exact properties of DARE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.merging import _random
from tests.merging.models import equal, merged, one_tensor, random_models, save_model, tensors_of


def mask_of(monkeypatch: pytest.MonkeyPatch, *kept: bool) -> None:
    """Let every mask be the given one."""
    from hf_ext.merging import dare

    monkeypatch.setattr(dare, "bernoulli", lambda *arguments: torch.tensor(kept))


@pytest.mark.parametrize(
    ("rescale", "expected"),
    [
        ("density", [0.0, 0.0, 6.0, 8.0]),
        ("l1", [0.0, 0.0, 4.285714, 5.714286]),
        (True, [0.0, 0.0, 4.285714, 5.714286]),
        ("none", [0.0, 0.0, 3.0, 4.0]),
        (False, [0.0, 0.0, 3.0, 4.0]),
    ],
)
def test_a_hand_computed_case(
    rescale: Any, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_of(monkeypatch, False, False, True, True)
    base, model = one_tensor(tmp_path, [0.0] * 4, [1.0, 2.0, 3.0, 4.0])
    found = merged(tmp_path, "dare", [model], base, density=0.5, rescale=rescale)
    torch.testing.assert_close(found["w"], torch.tensor(expected))


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    values, density, seeds = torch.tensor([1.0, -2.0, 0.5, 3.0]), 0.3, 2000
    masks = torch.stack([_random.bernoulli(density, seed, 0, "w", 0, 4) for seed in range(seeds)])
    mean = (masks * values / density).mean(dim=0)
    error = values.abs() * ((1 / density - 1) / seeds) ** 0.5  # standard deviation of a Bernoulli mean
    assert bool(((mean - values).abs() <= 5 * error).all())


def test_masks_go_by_position_seed_parent_and_name() -> None:
    whole = _random.bernoulli(0.4, 1, 2, "w", 0, 1000)
    for start, count in ((0, 1), (1, 7), (8, 8), (13, 500), (999, 1)):
        assert torch.equal(_random.bernoulli(0.4, 1, 2, "w", start, count), whole[start : start + count])
    for seed, parent, name in ((2, 2, "w"), (1, 3, "w"), (1, 2, "v")):
        other = _random.bernoulli(0.4, seed, parent, name, 0, 1000)
        assert 0.3 < float((other == whole).float().mean()) < 0.7
    assert 350 < int(whole.sum()) < 450
    assert bool(_random.bernoulli(1.0, 0, 0, "w", 0, 100).all())


def test_draws_do_not_change_between_releases() -> None:
    assert _random.draws(0, 0, "w", 0, 4).tolist() == DRAWS


DRAWS = [334006954, 1114504985, 58478962, 3262266873]


def test_a_further_model_changes_no_other_mask(tmp_path: Path) -> None:
    base, *models = random_models(tmp_path, 4, dtype=torch.float32)
    zero = save_model(tmp_path / "zero", tensors_of(base))
    two = merged(tmp_path, "dare", models[:2], base, density=0.3)
    assert equal(merged(tmp_path, "dare", [*models[:2], zero], base, density=0.3), two)


def test_the_seed_decides(tmp_path: Path) -> None:
    base, model = random_models(tmp_path, 2)
    runs = [
        merged(tmp_path, "dare", [model], base, density=0.3, options={"seed": seed}) for seed in (0, 1, 0)
    ]
    assert equal(runs[0], runs[2])
    assert not equal(runs[0], runs[1])


def test_density_one_is_task_arithmetic_or_untrimmed_ties(tmp_path: Path) -> None:
    base, *models = random_models(tmp_path, 4)
    linear = merged(tmp_path, "dare_linear", models, base, density=1.0, weight=0.4)
    assert equal(linear, merged(tmp_path, "task_arithmetic", models, base, weight=0.4))
    ties = merged(tmp_path, "dare_ties", models, base, density=1.0, weight=0.4, normalize=True)
    assert equal(ties, merged(tmp_path, "ties", models, base, density=1.0, weight=0.4))


def test_the_density_must_be_given_and_merge_is_not_said_twice(tmp_path: Path) -> None:
    base, model = random_models(tmp_path, 2)
    with pytest.raises(ValueError, match="density must be given"):
        merged(tmp_path, "dare", [model], base)
    with pytest.raises(ValueError, match="merge must be left out with merge_method 'dare_ties'"):
        merged(tmp_path, "dare_ties", [model], base, density=0.5, merge="linear")
    narrow: list[dict[str, Any]] = [{"density": 0.5}, {"density": {"filter": "mlp", "value": 0.5}}]
    other = save_model(tmp_path / "m2", tensors_of(model))
    with pytest.raises(ValueError, match=r"density has no value for lm_head\.weight"):
        merged(tmp_path, "dare", [model, other], base, parents=narrow)
    # Every model may bring its own.
    parents: list[dict[str, Any]] = [{"density": 0.5}]
    with_base = merged(tmp_path, "dare", [base, model], base, parents=[{}, *parents])
    assert equal(with_base, merged(tmp_path, "dare", [model], base, density=0.5))
    assert equal(
        merged(tmp_path, "dare", [model], base, parents=parents),
        merged(tmp_path, "dare", [model], base, density=0.5),
    )
