"""Adaptive batch size: the statistics, the macro-batches, and a run's counters, end and learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, default_data_collator

import hf_ext
from hf_ext.callbacks import (
    AdaptiveBatchSizeCallback,
    AnnealingLawCallback,
    InfiniteLRCallback,
    RefinedLinearDecayCallback,
    grown_batch,
    required_batch,
)
from hf_ext.callbacks._gradient_noise import Noise, NoiseMeter, adam_divisor, statistics
from hf_ext.callbacks._macro_batches import (
    MacroBatch,
    MacroBatchCallback,
    groups_of_update,
    refuse_trainer,
    regroup,
    updates_left,
)
from hf_ext.callbacks._recorded_norms import recorded_norms
from hf_ext.callbacks.adaptive_batch_size import halves
from tests.callbacks.runs import SaveAt, StopAt, build, equal, logged, parameters, rows, tiny_model
from tests.reference import adaptive_batch_size as reference

FOUR = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]])


# The statistics -----------------------------------------------------------------------------------


def measured(gradients: Tensor, samples: int, shares: Tensor | None = None, **options: Any) -> Noise:
    """Return what the meter finds where micro-batches have these gradients (M, d) of their mean losses."""
    weight = nn.Parameter(torch.zeros(gradients.shape[1]))
    meter = NoiseMeter([weight], sharded=False, micro_batches=len(gradients), **options)
    shares = torch.full((len(gradients),), 1.0 / len(gradients)) if shares is None else shares
    for gradient, share in zip(gradients, shares, strict=True):
        meter.set_aside()
        weight.grad = gradient * share
        meter.take(float(share))
    noise = meter.finish(samples)
    assert noise is not None
    return noise


def test_norm_test_on_four_gradients() -> None:
    noise = measured(FOUR, 4)
    assert noise.squared_norm == pytest.approx(2.0)
    assert noise.variance == pytest.approx(4 / 3)
    assert grown_batch(4, required_batch(noise, eta=0.2), 1000) == 17
    assert required_batch(noise, eta=0.2) == pytest.approx(16.67, abs=0.01)
    assert required_batch(noise, eta=0.5) == pytest.approx(2.67, abs=0.01)
    assert grown_batch(4, required_batch(noise, eta=0.5), 1000) == 4


def test_inner_product_tests_on_four_gradients() -> None:
    noise = measured(FOUR, 4, products=True)
    assert noise.along == pytest.approx(4 / 3)
    assert noise.across == pytest.approx(2 / 3)
    by_product = required_batch(noise, "inner_product", theta=0.2)
    assert by_product == pytest.approx(8.33, abs=0.01)
    assert grown_batch(4, by_product, 1000) == 9
    assert required_batch(noise, "augmented", theta=10.0, nu=0.2) == pytest.approx(8.33, abs=0.01)
    assert required_batch(noise, "augmented", theta=0.1, nu=0.2) == pytest.approx(100 / 3)


def test_micro_batches_of_two() -> None:
    noise = measured(FOUR.view(2, 2, 2).mean(1), 4)
    assert noise.variance == pytest.approx(2.0)
    assert grown_batch(4, required_batch(noise, eta=0.2), 1000) == 25
    assert grown_batch(4, required_batch(noise, eta=0.5), 1000) == 4


def test_micro_batches_measure_the_variance_of_samples() -> None:
    # Over all ways to make pairs of four samples, the mean is the variance of single samples exactly.
    for products in (False, True):
        found = []
        for other in (1, 2, 3):
            rest = [index for index in (1, 2, 3) if index != other]
            pairs = torch.stack([FOUR[[0, other]].mean(0), FOUR[rest].mean(0)])
            found.append(measured(pairs, 4, products=products))
        _, v1, v2, _ = reference.variances(FOUR)
        assert sum(noise.variance for noise in found) / 3 == pytest.approx(v1)
        if products:
            assert sum(noise.along or 0.0 for noise in found) / 3 == pytest.approx(v2)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_statistics_are_those_of_the_definition(count: int) -> None:
    gradients = torch.randn(count, 7, generator=torch.Generator().manual_seed(count)) + 0.5
    noise = measured(gradients, count, products=True)
    norm, v1, v2, v3 = reference.variances(gradients)
    found = (noise.squared_norm, noise.variance, noise.along, noise.across)
    assert found == pytest.approx((norm, v1, v2, v3), rel=1e-5)
    for test in ("norm", "inner_product", "augmented", "coordinate"):
        tolerances = {"eta": 0.3, "theta": 0.4, "nu": 0.5}
        wanted = reference.required(gradients, test, **tolerances, sizes=[7])
        assert required_batch(noise, test, **tolerances) == pytest.approx(wanted, rel=1e-5)
        assert grown_batch(count, wanted, 9) == reference.next_batch(count, wanted, 9)


def test_unequal_shares() -> None:
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.1, 0.3, 0.25, 0.05, 0.3])
    norm, variance = reference.weighted_variance(gradients, shares, 20)
    for products in (False, True):
        noise = measured(gradients, 20, shares, products=products)
        assert (noise.squared_norm, noise.variance) == pytest.approx((norm, variance), rel=1e-5)


def test_a_micro_batch_without_items_is_no_noise() -> None:
    with_empty = torch.cat([FOUR, torch.zeros(1, 2)])
    noise = measured(with_empty, 4, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    assert noise.variance == pytest.approx(4 / 3)
    weight = nn.Parameter(torch.zeros(2))
    meter = NoiseMeter([weight], sharded=False, micro_batches=2)
    for share in (1.0, 0.0):
        meter.set_aside()
        weight.grad = torch.ones(2) * share
        meter.take(share)
    assert meter.finish(4) is None


def test_more_than_eight_micro_batches_are_kept_as_eight_groups() -> None:
    gradients = torch.randn(24, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    noise = measured(gradients, 24, products=True)
    pooled = measured(gradients.view(8, 3, 7).mean(1), 24, products=True)
    assert noise.variance == pytest.approx(pooled.variance, rel=1e-5)
    assert noise.along == pytest.approx(pooled.along, rel=1e-4)


def test_rounding_makes_no_negative_variance_and_no_gradient_is_not_usable() -> None:
    same = torch.full((4, 2), 1.0)
    noise = measured(same, 4, products=True)
    assert noise.variance == 0.0
    assert noise.along == pytest.approx(0.0, abs=1e-5)
    assert not measured(torch.zeros(4, 2), 4).usable
    assert not measured(FOUR * torch.inf, 4).usable
    with pytest.raises(ValueError, match="micro_batches must be at least 2"):
        statistics(torch.ones(1), torch.ones(1), 1, 4)


def test_the_batch_never_shrinks_and_keeps_its_limits() -> None:
    assert grown_batch(8, 2.0, 64) == 8
    assert grown_batch(8, 1e300, 64) == 64
    assert grown_batch(8, 1e300, 64, growth_cap=1.5) == 12
    assert grown_batch(8, 9.2, 64, growth_cap=4.0) == 10
    assert grown_batch(64, 100.0, 48) == 64


def model_gradients(model: Any, batches: list[dict[str, Tensor]], shares: list[float]) -> Iterator[None]:
    """Run a backward of each batch's mean loss times its share; yield between them."""
    for batch, share in zip(batches, shares, strict=True):
        (model(**batch).loss * share).backward()
        yield


def micro_batches(count: int, size: int = 1) -> list[dict[str, Tensor]]:
    ids = torch.tensor(rows()["input_ids"])[: count * size].split(size)
    return [{"input_ids": part, "labels": part} for part in ids]


@pytest.mark.parametrize("metric", ["euclidean", "preconditioned"])
def test_the_meter_on_a_model_against_the_gradient_of_each_sample(metric: str) -> None:
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    samples = micro_batches(4)
    each: list[Tensor] = []
    for sample in samples:
        model.zero_grad()
        model(**sample).loss.backward()
        each.append(torch.cat([p.grad.flatten() for p in parameters]))
    model.zero_grad()
    plain = [None for _ in model_gradients(model, samples, [0.25] * 4)]
    assert len(plain) == 4
    accumulated = [p.grad.clone() for p in parameters]
    assert adam_divisor(optimizer) is None
    optimizer.step()
    optimizer.state_dict()
    model.load_state_dict(tiny_model().state_dict())
    divisor = adam_divisor(optimizer) if metric == "preconditioned" else None
    weights = None
    if metric == "preconditioned":
        state = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999) for p in parameters]
        weights = torch.cat([1.0 / (second.sqrt() + 1e-8).flatten() for second in state])
    for products in (False, True):
        model.zero_grad()
        meter = NoiseMeter(parameters, sharded=False, micro_batches=4, products=products, divisor=divisor)
        steps = model_gradients(model, samples, [0.25] * 4)
        for _ in samples:
            meter.set_aside()
            next(steps)
            meter.take(0.25)
        # The update's gradient is that of plain accumulation, to the bit.
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, accumulated, strict=True))
        noise = meter.finish(4)
        assert noise is not None
        norm, v1, v2, v3 = reference.variances(torch.stack(each), weights)
        assert (noise.squared_norm, noise.variance) == pytest.approx((norm, v1), rel=1e-4)
        if products:
            assert (noise.along, noise.across) == pytest.approx((v2, v3), rel=1e-3)
        if metric == "euclidean":
            sizes = [p.numel() for p in parameters]
            wanted = reference.required(torch.stack(each), "coordinate", eta=0.1, theta=1, nu=1, sizes=sizes)
            assert required_batch(noise, "coordinate", eta=0.1) == pytest.approx(wanted, rel=1e-3)


# Groups of micro-batches --------------------------------------------------------------------------


def test_groups_keep_order_and_only_leading_ones_are_empty() -> None:
    for total, count in itertools.product(range(1, 9), range(1, 6)):
        groups = regroup(list(range(total)), count)
        assert [item for group in groups for item in group] == list(range(total))
        assert len(groups) == count
        assert groups[-1]
        filled = [bool(group) for group in groups]
        assert filled == sorted(filled)
    assert [len(group) for group in regroup(list(range(6)), 2)] == [3, 3]


def simulate(
    length: int, accumulation: int, max_steps: int, factors: list[int]
) -> list[tuple[int, bool, int]]:
    """Return (micro-batches, whether the Trainer updates once and at the end, forecast) of each update."""
    found = []
    time, factors = 0, list(factors)
    while time < max_steps:
        step = used = 0
        in_epoch = -(-length // accumulation)
        for _ in range(in_epoch):  # the Trainer's loop over the updates of an epoch
            factor = factors[0] if len(factors) == 1 else factors.pop(0)
            left = max_steps - time
            drawn = min(factor * accumulation, length - used, left * accumulation)
            if drawn == 0:
                break
            forecast = updates_left(left, used, length, accumulation, factor)
            groups = groups_of_update(step, accumulation, length)
            syncs = [(step + i) % accumulation == 0 or step + i == length for i in range(1, groups + 1)]
            step += groups
            time += -(-(used + drawn) // accumulation) + used // -accumulation
            used += drawn
            found.append((drawn, sum(syncs) == 1 and syncs[-1], forecast))
    assert time == max_steps
    return found


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("factors", [[1], [2], [1, 3], [1, 1, 2, 5], [20]])
def test_the_trainer_updates_once_for_each_draw(length: int, accumulation: int, factors: list[int]) -> None:
    in_epoch = -(-length // accumulation)
    for max_steps in (1, in_epoch, 2 * in_epoch + 1):
        updates = simulate(length, accumulation, max_steps, factors)
        assert all(once for _, once, _ in updates)
        full, rest = divmod(max_steps, in_epoch)
        total = full * length + min(rest * accumulation, length)
        assert sum(drawn for drawn, _, _ in updates) == total
        steady = len(factors) - 1
        for index, (_, _, forecast) in enumerate(updates):
            if index >= steady:
                assert forecast == len(updates) - index


@dataclass(kw_only=True, eq=False, repr=False)
class Planned(MacroBatchCallback):
    """Takes the multiples of the batch from a list, one for each update; the last one for all that follow."""

    plan: str = "1"
    budget: str = "samples"

    info = SimpleNamespace(name="planned")  # pyright: ignore[reportAssignmentType]

    def factors(self, unit: int) -> tuple[int, int]:
        steps = [int(part) for part in self.plan.split()]
        return steps[0], max(steps)

    def counts_samples(self) -> bool:
        return self.budget == "samples"

    def run_group(self, run: Callable[[Any], Tensor], model: Any, group: MacroBatch, items: Any) -> Tensor:
        total = super().run_group(run, model, group, items)
        steps = [int(part) for part in self.plan.split()]
        if self.group_ends_update:
            self.factor = steps[min(self.trainer.state.global_step + 1, len(steps) - 1)]
        return total


class Recorder:
    """A collator that remembers the first token of each sample."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        self.seen += [int(feature["input_ids"][0]) for feature in features]
        return default_data_collator(features)


def recorded(trainer: Trainer) -> Recorder:
    trainer.data_collator = Recorder()
    return trainer.data_collator


def numbers(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the training logs but for what a callback of ours has added."""
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    timed = ("per_second", "runtime")
    return [{k: v for k, v in e.items() if "/" not in k and not k.endswith(timed)} for e in found]


def test_ten_updates_of_24_samples(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    options |= {"save_strategy": "no", "data": rows().select(range(24))}
    trainer: Any = build(tmp_path, Planned(plan="1 1 2 2 3"), **options)
    seen = recorded(trainer)
    trainer.train()
    assert trainer.state.global_step == 10
    assert sorted(seen.seen) == sorted(row[0] for row in rows().select(range(24))["input_ids"])
    assert logged(trainer, "planned/batch") == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert logged(trainer, "planned/samples")[-1] == 24
    assert logged(trainer, "epoch")[-1] == 1.0
    # The rate is that of a fixed batch of 1 after as many samples, and 0 at the end.
    before = [0, 1, 2, 4, 6, 9, 12, 15, 18, 21]
    assert logged(trainer, "learning_rate") == [1e-2 * ((24 - used) / 24) for used in before]
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert trainer.state.max_steps == 10


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_constant_multiple_is_plain_accumulation(accumulation: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "include_num_input_tokens_seen": "all"}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}
    plain: Any = build(tmp_path, gradient_accumulation_steps=6, max_steps=7, **options)
    plain.train()
    macro = build(
        tmp_path,
        AdaptiveBatchSizeCallback(batch_max=64, batch_start=12, test_interval=1000),
        gradient_accumulation_steps=accumulation,
        max_steps=38 // accumulation,  # an epoch is of 32 batches: its last update has 2 of them
        **options,
    )
    macro.train()
    assert macro.state.global_step == plain.state.global_step == 7
    assert equal(parameters(macro), parameters(plain))
    for ours, theirs in zip(numbers(macro), numbers(plain), strict=True):
        # Sums of sums of losses are logged; all else is the same to the bit.
        assert {**ours, "loss": 0.0} == {**theirs, "loss": 0.0}
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert len(macro.state.log_history) == len(plain.state.log_history)
    assert macro.state.total_flos == plain.state.total_flos


def test_constant_multiple_with_equal_epochs_logs_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"include_num_input_tokens_seen": "all", "lr_scheduler_type": "linear"}
    plain: Any = build(tmp_path, gradient_accumulation_steps=4, max_steps=16, **options)
    plain.train()
    start = AdaptiveBatchSizeCallback(batch_max=8, batch_start=8)
    macro = build(tmp_path, start, max_steps=64, **options)
    macro.train()
    assert numbers(macro) == numbers(plain)
    assert equal(parameters(macro), parameters(plain))
    assert macro.state.total_flos == plain.state.total_flos
    assert macro.state.max_steps == plain.state.max_steps


@pytest.mark.parametrize("test", ["norm", "augmented"])
def test_a_run_that_is_tested_and_never_grows_is_the_plain_one(test: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "gradient_accumulation_steps": 2}
    plain: Any = build(tmp_path, **options)
    plain.train()
    wide: dict[str, Any] = {"eta": 1e6, "theta": 1e6, "nu": 1e6}
    tested = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=64, test=test, **wide), **options)
    tested.train()
    assert logged(tested, "adaptive_batch_size/required")[-1] > 0.0
    assert logged(tested, "adaptive_batch_size/batch") == [4.0] * 10
    assert numbers(tested) == numbers(plain)
    assert equal(parameters(tested), parameters(plain))


def test_an_update_of_one_micro_batch_is_tested_in_halves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "per_device_train_batch_size": 3, "max_steps": 4}
    plain: Any = build(tmp_path, **options)
    plain.train()
    tested: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=63, eta=1e6), **options)
    tested.train()
    assert logged(tested, "adaptive_batch_size/required")[0] > 0.0
    assert logged(tested, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(tested)[name], value, rtol=0.0, atol=2e-4, msg=name)


def test_what_cannot_be_cut_in_halves_is_refused() -> None:
    good = {"input_ids": torch.arange(6).view(3, 2), "names": ["a", "b", "c"]}
    first, second = halves(good, 3)
    assert first["names"] == ["a"]
    assert second["input_ids"].tolist() == [[2, 3], [4, 5]]
    for bad in ({"x": torch.zeros(6, 2)}, {"x": torch.tensor(1.0)}, {"x": torch.zeros(1, 3)}, {"x": 3}):
        with pytest.raises(ValueError, match=r"'x' is not 3 rows .* gradient_accumulation_steps=2"):
            halves({**good, **bad}, 3)


def test_halves_of_a_loss_that_counts_no_items_are_not_the_whole(tmp_path: Path) -> None:
    # Not a test in update 1; the refusal comes before it all the same.
    callback = AdaptiveBatchSizeCallback(batch_max=64, test_interval=5)
    trainer: Any = build(tmp_path, callback, save_strategy="no", per_device_train_batch_size=4)
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps must be at least 2, or batch_start two"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_tail_of_one_micro_batch_is_no_update_to_halve(stream: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "per_device_train_batch_size": 2, "max_steps": 7}
    if stream:
        options |= {"data": IterableDataset.from_generator(lambda: iter(rows().select(range(14))))}
    callback = AdaptiveBatchSizeCallback(batch_start=4, batch_max=8, eta=1e6)
    trainer: Any = build(tmp_path, callback, **options)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert logged(trainer, "adaptive_batch_size/batch") == [4.0, 4.0, 4.0, 2.0]


def test_samples_of_a_sampler_that_draws_more_than_the_data(tmp_path: Path) -> None:
    class Drawn(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.WeightedRandomSampler([1.0] * 8, 20)

    trainer: Any = build(tmp_path, save_strategy="no")
    trainer.__class__ = Drawn
    trainer.train_dataset = rows().select(range(8))
    hf_ext.attach(trainer, AdaptiveBatchSizeCallback(batch_max=4, eta=1e6))
    trainer.train()
    assert logged(trainer, "adaptive_batch_size/samples") == [2.0 * step for step in range(1, 11)]


def test_a_short_micro_batch_is_not_cut_in_halves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "per_device_train_batch_size": 4, "max_steps": -1}
    options |= {"data": rows().select(range(14)), "num_train_epochs": 2}
    plain: Any = build(tmp_path, **options)
    plain.train()
    tested: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=8, eta=1e6), **options)
    tested.train()
    assert logged(tested, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    required = logged(tested, "adaptive_batch_size/required")
    assert [a == b for a, b in itertools.pairwise(required)] == [i in (2, 6) for i in range(7)]
    assert logged(tested, "adaptive_batch_size/batch") == [4.0, 4.0, 4.0, 2.0] * 2
    assert logged(tested, "adaptive_batch_size/samples")[-1] == 28.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_without_labels_is_not_tested(accumulation: int, tmp_path: Path) -> None:
    data = rows().select(range(16))
    labelled = [[-100] * 12 if i % 16 >= 4 else row for i, row in enumerate(data["labels"])]
    data = Dataset.from_dict({"input_ids": data["input_ids"], "labels": labelled})
    options: dict[str, Any] = {"save_strategy": "no", "data": data, "max_steps": 8 // accumulation}
    options |= {"gradient_accumulation_steps": accumulation, "logging_nan_inf_filter": False}
    plain: Any = build(tmp_path, **options)
    plain.train()
    tested: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=16, eta=1e6), **options)
    tested.train()
    assert any(not math.isfinite(loss) or loss == 0.0 for loss in logged(plain, "loss"))
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(tested)[name], value, rtol=0.0, atol=2e-4, msg=name)


def test_an_update_is_tested_by_all_processes_or_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if another process always had a reason to leave the test out.
    monkeypatch.setattr(
        "hf_ext.callbacks.adaptive_batch_size.dist.all_reduce_sum_", lambda tensor: tensor + 1
    )
    callback = AdaptiveBatchSizeCallback(batch_max=16, eta=1e-3)
    trainer: Any = build(tmp_path, callback, save_strategy="no", gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert logged(trainer, "adaptive_batch_size/required") == [0.0] * 4


def test_a_parameter_without_moments_is_not_measured() -> None:
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused])
    used.grad = torch.ones(2)
    optimizer.step()
    divisor = adam_divisor(optimizer)
    assert divisor is not None
    assert torch.isfinite(divisor(used)).all()
    assert (torch.ones(2) / divisor(unused) == 0.0).all()


def test_tokens_that_the_loss_counts_weigh_the_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Micro-batches of one row with 2 to 11 labels: their mean losses have unequal shares.
    ids = rows().select(range(8))["input_ids"]
    labels = [[-100] * (11 - 2 - i) + row[11 - 2 - i :] for i, row in enumerate(ids)]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    found: list[Noise] = []
    original = NoiseMeter.finish

    def finish(self: NoiseMeter, samples: int) -> Noise | None:
        noise = original(self, samples)
        assert noise is not None
        found.append(noise)
        return noise

    monkeypatch.setattr(NoiseMeter, "finish", finish)
    options: dict[str, Any] = {"save_strategy": "no", "per_device_train_batch_size": 1, "max_steps": 2}
    options |= {"gradient_accumulation_steps": 4, "data": data, "learning_rate": 0.0, "weight_decay": 0.0}
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=64, eta=1e6), **options)
    seen = recorded(trainer)
    trainer.train()
    order = [[row[0] for row in ids].index(token) for token in seen.seen]
    model = tiny_model()
    for noise, part in zip(found, (order[:4], order[4:]), strict=True):
        gradients, counts = [], []
        for index in part:
            model.zero_grad()
            model(input_ids=torch.tensor([ids[index]]), labels=torch.tensor([labels[index]])).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            counts.append(sum(label != -100 for label in labels[index][1:]))
        shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        norm, variance = reference.weighted_variance(torch.stack(gradients), shares, 4)
        assert (noise.squared_norm, noise.variance) == pytest.approx((norm, variance), rel=1e-4)


# A run that grows ---------------------------------------------------------------------------------

GROWS = {"batch_max": 24, "eta": 0.8, "test_interval": 2, "growth_cap": 2.0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_growing_run_uses_the_samples_of_a_plain_one(accumulation: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"include_num_input_tokens_seen": "all", "max_steps": -1}
    options |= {"num_train_epochs": 2.5, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    plain: Any = build(tmp_path, **options)
    before = recorded(plain)
    plain.train()
    grown: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), **options)
    after = recorded(grown)
    grown.train()
    batches = logged(grown, "adaptive_batch_size/batch")
    assert grown.state.global_step < plain.state.global_step / 2
    assert max(batches) > 12
    # A loader draws one batch ahead.
    used = 160
    assert after.seen[:used] == before.seen[:used]
    assert sum(batches) == used == logged(grown, "adaptive_batch_size/samples")[-1]
    assert grown.state.num_input_tokens_seen == plain.state.num_input_tokens_seen
    assert grown.state.total_flos == pytest.approx(plain.state.total_flos)
    assert grown.state.epoch == plain.state.epoch
    assert grown.state.max_steps == grown.state.global_step
    assert grown.lr_scheduler.get_last_lr() == plain.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_the_end_is_that_of_an_ordinary_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 24,
        "save_steps": 100,
        "eval_strategy": "steps",
        "eval_steps": 100,
    }
    bars: list[tuple[int, int]] = []

    class Bar(ProgressCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.training_bar is not None
            bars.append((self.training_bar.n, self.training_bar.total))
            super().on_train_end(args, state, control, **kwargs)

    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), others=[Bar()], **options)
    trainer.train()
    end = trainer.state.global_step
    assert end < 24
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [end]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{end}"]
    assert bars == [(end, end)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_of_the_trainer_follow_samples(schedule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "save_strategy": "no", "lr_scheduler_type": schedule}
    options |= {"warmup_steps": 6}
    plain: Any = build(tmp_path, **options)
    plain.train()
    grown: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), **options)
    grown.train()
    before = [0.0, *logged(grown, "adaptive_batch_size/samples")[:-1]]
    rates = logged(plain, "learning_rate")
    assert logged(grown, "learning_rate") == [rates[round(used / 2)] for used in before]


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda: InfiniteLRCallback(warmup_steps=4, cooldown_steps=20), False),
        (lambda: RefinedLinearDecayCallback(record=False), True),
    ],
    ids=["infinite_lr", "refined_linear_decay"],
)
def test_curves_of_the_library_follow_samples(make: Callable[[], Any], first: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "save_steps": 5}
    plain: Any = build(tmp_path / "plain", make(), max_steps=40, save_strategy="no")
    plain.train()
    rates = logged(plain, "learning_rate")
    callbacks = [make(), AdaptiveBatchSizeCallback(**GROWS)]
    folder = tmp_path / "grown"
    grown: Any = build(folder, *(reversed(callbacks) if first else callbacks), **options)
    grown.train()
    before = [0.0, *logged(grown, "adaptive_batch_size/samples")[:-1]]
    assert grown.state.global_step < 20
    assert logged(grown, "learning_rate") == [rates[round(used / 2)] for used in before]
    resumed = build(tmp_path / "resumed", AdaptiveBatchSizeCallback(**GROWS), make(), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert logged(resumed, "learning_rate") == logged(grown, "learning_rate")
    assert equal(parameters(resumed), parameters(grown))


@pytest.mark.parametrize(("budget", "accumulation"), [("samples", 2), ("updates", 1)])
def test_resumed_in_a_later_epoch_after_the_batch_has_grown(
    budget: str, accumulation: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_steps": 90 // accumulation if budget == "samples" else 14,
        "save_steps": 3,
    }
    options |= {"gradient_accumulation_steps": accumulation}
    settings = {**GROWS, "budget": budget, "scale_lr": 0.5}

    def make() -> Trainer:
        return build(tmp_path / "run", AdaptiveBatchSizeCallback(**settings), **options)

    whole = make()
    order = recorded(whole)
    whole.train()
    checkpoints = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) >= 4
    saved = {entry["step"]: entry for entry in whole.state.log_history if "loss" in entry}
    epochs = set()
    for step in (checkpoints[1], checkpoints[-2]):
        used = int(saved[step]["adaptive_batch_size/samples"])
        epochs.add(int(saved[step]["epoch"]))
        assert saved[step]["adaptive_batch_size/batch"] > 2
        resumed = make()
        rest = recorded(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert rest.seen == order.seen[used:], step
        assert numbers(resumed) == numbers(whole), step
        assert equal(parameters(resumed), parameters(whole)), step
        key = "adaptive_batch_size/batch"
        assert logged(resumed, key) == logged(whole, key), step
    assert len(epochs) > 1


def test_ignored_data_skip_keeps_the_budget(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 60, "save_steps": 4}
    build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), **options).train()
    again: Any = build(tmp_path / "b", AdaptiveBatchSizeCallback(**GROWS), ignore_data_skip=True, **options)
    seen = recorded(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    samples = logged(again, "adaptive_batch_size/samples")
    assert samples[-1] == 120
    assert 0 <= len(seen.seen) - (120 - samples[3]) <= 2  # a loader draws one batch ahead
    assert again.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_the_rate_grows_with_the_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "save_strategy": "no", "lr_scheduler_type": "constant"}
    grown: Any = build(
        tmp_path, AdaptiveBatchSizeCallback(**GROWS, scale_lr=0.5, budget="updates"), **options
    )
    grown.train()
    keys = ("adaptive_batch_size/batch", "learning_rate", "epoch")
    updates = list(zip(*(logged(grown, key) for key in keys), strict=True))
    assert max(batch for batch, _, _ in updates) > 8
    for batch, rate, epoch in updates:
        if epoch != int(epoch):  # the last update of an epoch can be short, at the rate of a full one
            assert rate == pytest.approx(1e-2 * (batch / 2) ** 0.5)


@pytest.mark.parametrize("budget", ["samples", "updates"])
def test_data_without_a_length(budget: str, tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Any]]:
        for row in rows()["input_ids"]:
            yield {"input_ids": row, "labels": row}

    data: Any = IterableDataset.from_generator(stream)
    options: dict[str, Any] = {"data": data, "max_steps": 50 if budget == "samples" else 12, "save_steps": 5}
    whole: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS, budget=budget), **options)
    seen = recorded(whole)
    whole.train()
    samples = logged(whole, "adaptive_batch_size/samples")[-1]
    assert 0 <= len(seen.seen) - samples <= 2
    if budget == "samples":
        assert samples == 100
        assert whole.lr_scheduler.get_last_lr() == [0.0, 0.0]
        assert whole.state.max_steps == whole.state.global_step
    else:
        assert whole.state.global_step == 12
    for step in (5, 10):
        resumed = build(tmp_path / f"{step}", AdaptiveBatchSizeCallback(**GROWS, budget=budget), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(parameters(resumed), parameters(whole)), step


def test_a_short_update_at_the_end_of_an_epoch_is_not_tested(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "max_steps": 64}
    trainer = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=22, eta=0.8), **options)
    trainer.train()
    keys = ("adaptive_batch_size/required", "adaptive_batch_size/batch", "epoch")
    required, batches, epochs = (logged(trainer, key) for key in keys)
    short = [i for i, epoch in enumerate(epochs) if epoch == int(epoch) and batches[i] < batches[i - 1]]
    assert short
    assert all(required[i] == required[i - 1] for i in short)


def test_a_batch_no_larger_than_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "max_steps": 128}
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=10**6, eta=1e-3), **options)
    with pytest.warns(UserWarning, match="at most an epoch of the data, 64 samples or less"):
        trainer.train()
    assert logged(trainer, "adaptive_batch_size/batch") == [2.0, 62.0, 64.0, 64.0, 64.0]


def test_a_first_batch_larger_than_the_data_scales_no_rate(tmp_path: Path) -> None:
    callback = AdaptiveBatchSizeCallback(batch_start=16, batch_max=32, scale_lr=1.0)
    options: dict[str, Any] = {"save_strategy": "no", "data": rows().select(range(8)), "max_steps": 8}
    trainer: Any = build(tmp_path, callback, lr_scheduler_type="constant", **options)
    with pytest.warns(UserWarning, match="the batch is to start at 16"):
        trainer.train()
    assert logged(trainer, "adaptive_batch_size/batch") == [8.0, 8.0]
    assert logged(trainer, "learning_rate") == [0.01, 0.01]
    assert callback.factor == callback.largest_factor == 4


def test_a_demand_that_is_out_of_all_bounds_can_be_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 1}
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=8, eta=1e-200), **options)
    trainer.train()
    assert logged(trainer, "adaptive_batch_size/required")[0] == 1e18


def test_what_counts_updates_of_one_size_knows_that_the_batch_has_grown(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 32, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    adaptive = {"batch_max": 24, "eta": 0.8, "growth_cap": 2.0}
    others = [RefinedLinearDecayCallback(record=True), AnnealingLawCallback()]
    trainer: Any = build(tmp_path / "one", AdaptiveBatchSizeCallback(**adaptive), *others, **options)
    with pytest.warns(UserWarning, match="annealing_law: the batch has grown") as caught:
        trainer.train()
    assert sum("the batch has grown" in str(warning.message) for warning in caught) == 1
    with pytest.raises(ValueError, match=r"norms must be of a run whose updates are of one size.*has grown"):
        RefinedLinearDecayCallback(mode="refined", norms=str(tmp_path / "one")).check_files()
    # What is known of it is kept: here the batch grows no more.
    last = max(tmp_path.glob("one/checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    resumed = RefinedLinearDecayCallback(record=True)
    resumed.load_state_dict(resumed.read_state(last))
    assert resumed._batch_grew
    fixed: Any = build(tmp_path / "two", AdaptiveBatchSizeCallback(batch_max=2), *others, **options)
    fixed.train()
    assert len(recorded_norms(tmp_path / "two").step) == 32


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "text"),
    [
        ({"batch_max": 3}, {"gradient_accumulation_steps": 2}, "batch_max must be at least 4"),
        ({"batch_max": 9, "batch_start": 3}, {}, "batch_start must be a multiple of 2"),
        (
            {"batch_max": 9},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "lr_scheduler_type",
        ),
        (
            {"batch_max": 9},
            {"per_device_train_batch_size": 1},
            "per_device_train_batch_size must be at least 2",
        ),
        (
            {"batch_max": 9, "metric": "preconditioned"},
            {"optim": "sgd"},
            "metric must be 'euclidean'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    settings: dict[str, Any], arguments: dict[str, Any], text: str, tmp_path: Path
) -> None:
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(**settings), save_strategy="no", **arguments)
    with pytest.raises(ValueError, match=text):
        trainer.train()
    assert trainer.state.global_step == 0
    lambdas = getattr(trainer.lr_scheduler, "lr_lambdas", [])
    assert not any(f.__module__.startswith("hf_ext") for f in lambdas if hasattr(f, "__module__"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: setattr(t.args, "steps_per_generation", 4), "Trainer generates its batches by a plan"),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), r"DeepSpeed \(ZeRO\)"),
        (lambda t: setattr(t, "is_fsdp_enabled", True), "FSDP version 1"),
        (lambda t: setattr(t, "is_distributed_loading_by_transformers", True), "sharded at load time"),
        (lambda t: setattr(t.args, "_n_gpu", 2), "DataParallel"),
        (lambda t: setattr(t.model, "_tp_size", 2), "tensor parallelism"),
    ],
)
def test_trainers_and_engines_are_refused_by_name(change: Any, text: str, tmp_path: Path) -> None:
    trainer: Any = build(tmp_path)
    refuse_trainer(trainer, "AdamW")
    change(trainer)
    with pytest.raises(ValueError, match=text):
        refuse_trainer(trainer, "AdamW")


@pytest.mark.parametrize(
    "name", ["AsyncDistillationTrainer", "AsyncGRPOTrainer", "GKDTrainer", "GOLDTrainer", "OnlineDPOTrainer"]
)
def test_trainers_that_make_their_batches_are_refused(name: str, tmp_path: Path) -> None:
    trainer: Any = build(tmp_path)
    trainer.__class__ = type(name, (Trainer,), {})
    with pytest.raises(ValueError, match=f"{name} generates its batches by a plan"):
        refuse_trainer(trainer, "AdamW")


def test_optimizers_that_step_in_the_backward_are_refused(tmp_path: Path) -> None:
    from hf_ext.callbacks._macro_batches import refuse_trainer

    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer steps within the backward"):
        refuse_trainer(build(tmp_path), "LayerWiseDummyOptimizer")


def test_a_real_grpo_trainer_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    from hf_ext.callbacks._macro_batches import refuse_trainer

    folder = Path(hf_ext.__file__).parent / "assets" / "tiny-llama"
    arguments = GRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, num_generations=2)
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    with pytest.raises(ValueError, match="GRPOTrainer generates its batches"):
        refuse_trainer(trainer, "AdamW")


def test_scaling_the_rate_beside_another_owner_is_refused(tmp_path: Path) -> None:
    both = [InfiniteLRCallback(), AdaptiveBatchSizeCallback(batch_max=8, scale_lr=0.5)]
    with pytest.raises(ValueError, match=r"scale_lr must be 0 where InfiniteLRCallback sets"):
        build(tmp_path, *both).train()


def test_a_loss_whose_shares_are_not_known_is_refused(tmp_path: Path) -> None:
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=8), gradient_accumulation_steps=2)
    trainer.loss_is_scaled_for_ga = True
    trainer._get_num_items_in_batch = lambda batches, device: None
    with pytest.raises(ValueError, match="the share of a micro-batch is not known"):
        trainer.train()
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(batch_max=8), gradient_accumulation_steps=2)
    trainer._get_num_items_in_batch = lambda batches, device: torch.tensor(40 + len(batches))
    with pytest.raises(ValueError, match=r"make up 1\.952 of its loss"):
        trainer.train()


def test_another_batch_on_resume_is_refused(tmp_path: Path) -> None:
    build(tmp_path, AdaptiveBatchSizeCallback(**GROWS)).train()
    other: Any = build(tmp_path / "b", AdaptiveBatchSizeCallback(**GROWS), per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="per_device_train_batch_size must be 2, as in the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    other = build(tmp_path / "c", AdaptiveBatchSizeCallback(**GROWS), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be 1, as in the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_loss_that_the_trainer_divides_by_the_micro_batches(tmp_path: Path) -> None:
    # As DPO's: no count of items; the Trainer divides by the accumulation steps.
    ends = []
    wide = AdaptiveBatchSizeCallback(batch_max=64, batch_start=8, eta=1e6)
    runs: list[tuple[list[Any], dict[str, Any]]] = [
        ([], {"gradient_accumulation_steps": 4}),
        ([wide], {"max_steps": 40}),
    ]
    for callbacks, arguments in runs:
        trainer: Any = build(tmp_path, *callbacks, save_strategy="no", **arguments)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        ends.append(trainer)
    plain, macro = ends
    assert logged(macro, "adaptive_batch_size/required")[-1] > 0.0
    assert numbers(macro) == numbers(plain)
    assert equal(parameters(macro), parameters(plain))


def test_an_exception_leaves_the_scheduler_its_own_functions(tmp_path: Path) -> None:
    trainer: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), others=[StopAt(6)], max_steps=40)
    with pytest.raises(InterruptedError):
        trainer.train()
    modules = [getattr(f, "func", f).__module__ for f in trainer.lr_scheduler.lr_lambdas]
    assert modules == ["transformers.optimization"] * 2


def test_a_save_in_the_last_update_of_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 70, "save_strategy": "epoch"}
    whole: Any = build(tmp_path, AdaptiveBatchSizeCallback(**GROWS), others=[SaveAt(3)], **options)
    whole.train()
    for folder in sorted(tmp_path.glob("checkpoint-*"))[:2]:
        resumed = build(tmp_path / "again", AdaptiveBatchSizeCallback(**GROWS), **options)
        resumed.train(resume_from_checkpoint=str(folder))
        assert equal(parameters(resumed), parameters(whole)), folder.name
