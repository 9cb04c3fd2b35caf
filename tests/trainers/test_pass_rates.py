"""Pass rates, weights and draws by weight."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_ext.core.registry import get
from hf_ext.trainers._pass_rates import (
    WeightedRepeatSampler,
    beta_kernel,
    counts_of_columns,
    effective_size,
    estimate_pass_rates,
    mean_one,
    paced_weights,
    pass_rates,
    systematic_draws,
    warn_of_few,
)
from hf_ext.trainers.paced_distillation import PacedDistillationTrainer
from tests.reference import paced_distillation as reference
from tests.trainers.runs import build, rows

assert PacedDistillationTrainer.info is get("trainer", "paced_distillation")
RATES = torch.tensor([0.125, 0.25, 0.5, 0.75], dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "beta", "wanted"),
    [
        (1, 1, (0.109375, 0.1875, 0.25, 0.1875)),
        (2, 1, (0.013672, 0.046875, 0.125, 0.140625)),
        (1, 2, (0.095703, 0.140625, 0.125, 0.046875)),
        (0, 0, (1, 1, 1, 1)),
    ],
)
def test_the_kernel_by_hand(alpha: int, beta: int, wanted: tuple[float, ...]) -> None:
    assert beta_kernel(RATES, alpha, beta).tolist() == pytest.approx(wanted, abs=1e-6)
    plain = [reference.weight(p, alpha, beta) for p in RATES.tolist()]
    assert beta_kernel(RATES, alpha, beta).tolist() == pytest.approx(plain, rel=1e-12)


def test_limits_of_the_kernel() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert beta_kernel(ends, 1, 1).tolist() == [0.0, 0.0]
    assert beta_kernel(ends, 0, 0).tolist() == [1.0, 1.0]
    assert beta_kernel(ends, 0, 2).tolist() == [1.0, 0.0]
    assert beta_kernel(ends, 2, 0).tolist() == [0.0, 1.0]
    torch.testing.assert_close(beta_kernel(RATES, 3, 0.5), beta_kernel(1 - RATES, 0.5, 3))
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for alpha, beta in ((1, 1), (1, 2), (3, 1)):
        top = float(grid[beta_kernel(grid, alpha, beta).argmax()])
        assert top == pytest.approx(alpha / (alpha + beta), abs=1e-3)
    assert float(beta_kernel(torch.tensor([1 / 3]), 1, 2)) == pytest.approx(4 / 27, abs=1e-6)
    # Flat top: an error d of the rate costs d squared.
    assert 0.25 - float(beta_kernel(torch.tensor([0.4]), 1, 1)) == pytest.approx(0.01, abs=1e-6)


def test_normalized_weights_by_hand() -> None:
    rates = pass_rates(torch.tensor([0, 2, 4, 6, 8]), torch.full((5,), 8))
    weights = paced_weights(rates)
    assert weights.tolist() == pytest.approx((0, 1.5, 2, 1.5, 0))
    assert effective_size(weights) == pytest.approx(2.9412, abs=1e-4)
    given = torch.tensor([0, 0.125, 0.25, 0.5, 0.75, 1])
    wanted = (0, 0.893617, 1.531915, 2.042553, 1.531915, 0)
    assert paced_weights(given).tolist() == pytest.approx(wanted, abs=1e-6)
    counts = [0, 1, 2, 4, 6, 8]
    assert paced_weights(given).tolist() == pytest.approx(reference.weights(counts, 8), rel=1e-12)


def test_the_posterior_is_never_zero_or_one() -> None:
    rates = pass_rates(torch.tensor([0, 8]), torch.tensor([8, 8]), "posterior")
    assert rates.tolist() == pytest.approx([0.1, 0.9])
    assert beta_kernel(rates, 1, 1).tolist() == pytest.approx([0.09, 0.09])


def test_the_bias_of_the_raw_rate_is_one_factor() -> None:
    found = reference.expected_raw_weight(0.3, 8)
    assert found == pytest.approx(0.18375)
    assert found == pytest.approx(0.21 * 7 / 8)
    for p in (0.1, 0.5, 0.9):
        assert reference.expected_raw_weight(p, 8) == pytest.approx(p * (1 - p) * 7 / 8)


def test_what_gives_no_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="posterior"):
        paced_weights(torch.tensor([0.0, 1.0]))
    assert paced_weights(torch.tensor([0.0, 1.0]), min_weight=0.1).tolist() == [1.0, 1.0]
    for wrong in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="row 1"):
            paced_weights(torch.tensor([0.5, wrong]))
    with pytest.raises(ValueError, match="row 0"):
        mean_one(torch.tensor([-1.0, 2.0]))
    with pytest.raises(ValueError, match="paced_alpha"):
        paced_weights(RATES, alpha=-1.0)


def test_warnings_of_few_rows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_few(torch.ones(100).double(), 8)
        assert not caplog.text
        warn_of_few(paced_weights(torch.tensor([0.5] + [0.0] * 99)), 8)
    assert "worth 1.0" in caplog.text
    assert "100.0 times" in caplog.text


# Draws --------------------------------------------------------------------------------------------


def test_systematic_draws_by_hand() -> None:
    counts = torch.tensor([0, 0, 2, 2, 4, 4, 6, 6, 8, 8])
    weights = paced_weights(counts / 8)
    for offset in (0.0, 0.25, 0.5, 0.999999):
        drawn = counts[systematic_draws(weights, offset)].tolist()
        assert [drawn.count(value) for value in (0, 2, 4, 6, 8)] == [0, 3, 4, 3, 0]


def test_draws_are_those_of_the_plain_twin_and_within_one_of_their_number() -> None:
    rng = random.Random(0)
    for _ in range(20):
        weights = [
            rng.random() * (rng.random() < 0.7) + 1e-3 * rng.random() for _ in range(rng.randint(3, 40))
        ]
        state = rng.getstate()
        offset = rng.random()
        rng.setstate(state)
        drawn = systematic_draws(torch.tensor(weights), offset)
        assert drawn == reference.draws(torch.tensor(weights).double().tolist(), rng)
        for row, weight in enumerate(weights):
            expected = weight * len(weights) / sum(weights)
            assert abs(drawn.count(row) - expected) < 1 + 1e-6


def test_draws_have_the_weighted_mean() -> None:
    losses, weights = torch.tensor([2.0, 1.0, 0.4]), torch.tensor([0.1875, 0.25, 0.1875])
    assert float((losses * weights).sum() / weights.sum()) == pytest.approx(1.12)
    drawn = torch.tensor([systematic_draws(weights, (i + 0.5) / 1000) for i in range(1000)])
    assert float(losses[drawn].mean()) == pytest.approx(1.12, abs=1e-3)


def test_each_batch_is_repeated_and_epochs_differ() -> None:
    step, weights = 0, paced_weights(torch.linspace(0.0, 1.0, 13).double())
    sampler = WeightedRepeatSampler(13, 4, 3, 0, lambda update: weights, lambda: step)
    first = list(sampler)
    assert len(first) == len(sampler) == 36
    for place in range(0, 36, 12):
        batch = first[place : place + 4]
        assert first[place : place + 12] == batch * 3
    assert not {0, 12} & set(first)
    assert list(sampler) == first
    step = 3  # the next epoch
    assert list(sampler) != first
    assert list(WeightedRepeatSampler(13, 4, 3, 0, lambda update: weights, lambda: 4)) == list(sampler)


def test_new_weights_count_from_their_update_on() -> None:
    old, new = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1])
    sampler = WeightedRepeatSampler(8, 2, 1, 0, lambda update: new if update >= 6 else old, lambda: 4)
    drawn = list(sampler)  # updates 4 to 7
    assert set(drawn[:4]) <= {0, 1}
    assert set(drawn[4:]) <= {6, 7}


# Sampling -----------------------------------------------------------------------------------------


def estimated(tmp_path: Path, reward: Any, **settings: Any) -> Any:
    trainer = build(
        get("trainer", "paced_distillation"), tmp_path, given={"reward_funcs": reward}, save_strategy="no"
    )
    before = torch.get_rng_state()
    found = estimate_pass_rates(
        trainer._sampler,
        rows(5),
        trainer.reward_funcs,
        **{"rollouts": 4, "truncated_fails": False, **settings},
    )
    assert torch.equal(torch.get_rng_state(), before)
    return found


def test_completions_are_counted_per_prompt(tmp_path: Path) -> None:
    calls: list[Any] = []

    def alternate(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[Any]:
        calls.append((prompts, answer))
        # Row r passes r times of 4; one has no reward.
        return [None if i == 0 else float(i % 4 < i // 4) for i in range(len(prompts))]

    found = estimated(tmp_path, alternate)
    assert found.passed.tolist() == [0, 1, 2, 3, 4]
    assert found.rollouts.tolist() == [4] * 5
    prompts, answers = calls[0]
    assert prompts[4:8] == [rows(5)[1]["prompt"]] * 4
    assert answers[4:8] == [rows(5)[1]["answer"]] * 4


def test_a_truncated_completion_fails(tmp_path: Path) -> None:
    def always(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    found = estimated(tmp_path, always, truncated_fails=True)
    assert found.truncated.sum() > 0
    assert torch.equal(found.passed, 4 - found.truncated)
    assert estimated(tmp_path, always).passed.tolist() == [4] * 5


def test_an_exception_of_the_verifier_is_raised(tmp_path: Path) -> None:
    def wrong(**kwargs: Any) -> list[float]:
        raise RuntimeError("no verifier")

    with pytest.raises(RuntimeError, match="no verifier"):
        estimated(tmp_path, wrong)


def test_rates_of_the_data() -> None:
    data = Dataset.from_dict({"prompt": ["a", "b"], "pass_rate": [0.25, 0.5]})
    assert counts_of_columns(data.remove_columns("pass_rate"), "data", "raw") is None
    counts = counts_of_columns(data, "data", "raw")
    assert counts is not None
    assert pass_rates(counts.passed, counts.rollouts).tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="pass_n"):
        counts_of_columns(data, "data", "posterior")
    counts = counts_of_columns(data.add_column("pass_n", [8, 4]), "data", "posterior")  # type: ignore[call-arg]
    assert counts is not None
    assert pass_rates(counts.passed, counts.rollouts, "posterior").tolist() == pytest.approx([0.3, 0.5])
    with pytest.raises(ValueError, match="row 1"):
        counts_of_columns(Dataset.from_dict({"pass_rate": [0.5, 1.5]}), "data", "raw")


def test_a_stream_has_no_rows_to_count_for() -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    unused: Any = None
    with pytest.raises(TypeError, match=r"the data set must be a datasets\.Dataset, got IterableDataset"):
        estimate_pass_rates(unused, stream, unused, rollouts=2)
    seen = rows().add_column("images", [None] * 12)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="of text"):
        estimate_pass_rates(unused, seen, unused, rollouts=2)
