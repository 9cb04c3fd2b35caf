"""Sparse soups: equal zeros stay exactly, masks, the workflow and its resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ext.merging import (
    apply_masks,
    greedy_choice,
    magnitude_masks,
    masks_enforced,
    phase_sparsities,
    prune_retrain_average,
)
from hf_ext.merging._pruning import prunable
from hf_ext.merging._sparse_soups import mean_state
from tests.merging.models import equal, merged, save_model
from tests.reference import sparse_soup as reference

# From files ---------------------------------------------------------------------------------------


def pruned(tmp_path: Path, count: int, dtype: torch.dtype, keep: Tensor | None = None) -> list[Path]:
    """Write models with 90 % zeros at the same places, or with masks of their own."""
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(300, 130, generator=draw) > 0.9 if keep is None else keep
    folders = []
    for number in range(count):
        values = torch.randn(300, 130, generator=draw) * keep
        bias = torch.randn(300, generator=draw)
        bias[number] = 0.0  # not pruned: may be zero in one model
        tensors = {"up.weight": values.to(dtype), "up.bias": bias.to(dtype)}
        folders.append(save_model(tmp_path / f"p{number}", tensors))
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_zeros_are_those_of_the_mask(dtype: torch.dtype, count: int, tmp_path: Path) -> None:
    keep = torch.rand(300, 130, generator=torch.Generator().manual_seed(5)) > 0.9
    parents = [{"weight": 0.3 + number} for number in range(count)]
    found = merged(tmp_path, "sparse_soup", pruned(tmp_path, count, dtype, keep), parents=parents)
    assert torch.equal(found["up.weight"] != 0, keep)


def test_equals_the_reference(tmp_path: Path) -> None:
    models = pruned(tmp_path, 3, torch.float32)
    weights = [1.0, 2.0, 0.5]
    found = merged(tmp_path, "sparse_soup", models, parents=[{"weight": w} for w in weights])
    from tests.merging.models import tensors_of

    for name, value in found.items():
        lists = [tensors_of(model)[name].double().flatten().tolist() for model in models]
        expected = reference.mean(lists, weights)
        torch.testing.assert_close(
            value.double().flatten(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("options", [{}, {"block_bytes": 65536}])
def test_other_masks_are_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    models = pruned(tmp_path, 2, torch.float32)
    other = torch.rand(300, 130, generator=torch.Generator().manual_seed(8)) > 0.9
    (odd,) = pruned(tmp_path / "odd", 1, torch.float32, other)
    with pytest.raises(ValueError, match=r"up\.weight: .* the same zeros.*p0 \d+, p1 \d+"):
        merged(tmp_path, "sparse_soup", [*models, odd], options=options)
    assert not (tmp_path / "out").exists()
    parents: list[dict[str, float]] = [{}, {}, {"weight": 0.0}]  # one that does not count may be anything
    without = merged(tmp_path, "sparse_soup", models, out="without")
    assert equal(merged(tmp_path, "sparse_soup", [*models, odd], parents=parents), without)
    merged(tmp_path, "sparse_soup", [*models, odd], check_masks=False, out="free")


def test_one_stray_zero_is_refused(tmp_path: Path) -> None:
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    a[0] = b[0] = 0.0
    b[2, 1] = 0.0
    models = [save_model(tmp_path / "a", {"w": a}), save_model(tmp_path / "b", {"w": b})]
    with pytest.raises(ValueError, match=r"w: .*a 4, b 5, all together 4, of 16"):
        merged(tmp_path, "sparse_soup", models)


# Masks --------------------------------------------------------------------------------------------


def test_independent_masks_would_lose_half_of_the_zeros() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(10_000, generator=draw), torch.randn(10_000, generator=draw)
    masks = [magnitude_masks({"w": value}, 0.5)["w"] for value in (a, b)]
    both = ((a * masks[0] + b * masks[1]) / 2 == 0).float().mean().item()
    assert 0.24 < both < 0.26
    assert ((a * masks[0] + b * masks[0]) / 2 == 0).float().mean().item() == 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.97])
def test_masks_equal_the_reference_with_ties_and_earlier_masks(sparsity: float) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randint(-6, 7, (n,), generator=draw).float() for name, n in (("b", 61), ("a", 40))}
    weights["b"][17] = 9.0
    lists = {name: value.tolist() for name, value in weights.items()}
    found = magnitude_masks(weights, sparsity)
    assert {name: mask.tolist() for name, mask in found.items()} == reference.mask(lists, sparsity, {})
    assert sum(int(mask.sum()) for mask in found.values()) == round((1 - sparsity) * 101)
    further = magnitude_masks({n: w * found[n] for n, w in weights.items()}, 0.98, previous=found)
    expected = reference.mask(lists, 0.98, {name: mask.tolist() for name, mask in found.items()})
    assert {name: mask.tolist() for name, mask in further.items()} == expected
    assert all(not bool((mask & ~found[name]).any()) for name, mask in further.items())


def test_scopes_and_refusals() -> None:
    weights = {"large": torch.arange(1.0, 9.0) * 100, "small": torch.arange(1.0, 9.0)}
    uniform = magnitude_masks(weights, 0.5, scope="uniform")
    assert [int(mask.sum()) for mask in uniform.values()] == [4, 4]
    with pytest.raises(ValueError, match="sparsity must be lower: small would lose all its weights"):
        magnitude_masks(weights, 0.5)
    with pytest.raises(ValueError, match=r"at least that of the earlier masks, which keep 8"):
        magnitude_masks(weights, 0.2, previous=uniform)
    with pytest.raises(ValueError, match="infinite values in w"):
        magnitude_masks({"w": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="sparsity must be in"):
        magnitude_masks(weights, 1.0)


def test_what_is_pruned() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "inner": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv2d(1, 2, 3),
            "head": nn.Linear(4, 5),
        }
    )
    assert list(prunable(model)) == ["conv.weight", "head.weight", "inner.weight"]
    model["head"].weight = model["embedding"].weight
    assert list(prunable(model)) == ["conv.weight", "inner.weight"]


def test_masked_weights_stay_zero_under_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    masks = magnitude_masks({"weight": model.weight}, 0.8)
    apply_masks(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with masks_enforced(model, masks):
        for _ in range(100):
            model(torch.randn(8, 20)).square().sum().backward()
            optimizer.step()
            assert torch.equal(model.weight != 0, masks["weight"])
    optimizer.step()
    assert not torch.equal(model.weight != 0, masks["weight"]), "afterwards nothing is kept"


# The workflow -------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def retrain(model: nn.Module, phase: int, copy: int, steps: int = 8) -> None:
    draw = torch.Generator().manual_seed(100 * phase + copy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=draw)
        loss = nn.functional.mse_loss(model(x), x[:, :3] * 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    others = b.state_dict()
    return all(torch.equal(value, others[name]) for name, value in a.state_dict().items())


def test_the_sparsities_of_three_phases() -> None:
    assert phase_sparsities(0.9, 3) == pytest.approx([0.535841, 0.784557, 0.9], abs=1e-6)
    assert phase_sparsities(0.9, 1) == [0.9]


def test_the_result_has_exactly_the_zeros_of_its_mask() -> None:
    model = net()
    found = prune_retrain_average(model, retrain, sparsity=0.8, phases=3, copies=3)
    for name, mask in found.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    kept = sum(int(mask.sum()) for mask in found.masks.values())
    assert kept == round(0.2 * (6 * 16 + 16 * 3))
    assert found.sparsities == pytest.approx(phase_sparsities(0.8, 3), abs=0.01)
    assert found.chosen == ((0, 1, 2),) * 3


def test_one_copy_is_iterative_magnitude_pruning() -> None:
    model, plain = net(), net()
    prune_retrain_average(model, retrain, sparsity=0.8, phases=2, copies=1)
    masks: dict[str, Tensor] | None = None
    for phase, goal in enumerate(phase_sparsities(0.8, 2)):
        weights = {name: plain.get_parameter(name) for name in ("0.weight", "2.weight")}
        masks = magnitude_masks(weights, goal, previous=masks)
        with masks_enforced(plain, masks):
            retrain(plain, phase, 0)
    assert states_equal(model, plain)


def test_an_average_is_that_of_its_copies() -> None:
    copies: list[dict[str, Tensor]] = []

    def kept(model: nn.Module, phase: int, copy: int) -> None:
        retrain(model, phase, copy)
        copies.append({name: value.clone() for name, value in model.state_dict().items()})

    model = net()
    prune_retrain_average(model, kept, sparsity=0.5, phases=1, copies=4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, sum(copy[name] for copy in copies) / 4)  # pyright: ignore


def test_interrupted_between_copies_and_resumed(tmp_path: Path) -> None:
    whole, model = net(), net()
    prune_retrain_average(whole, retrain, sparsity=0.8, phases=2, copies=2)
    trained: list[tuple[int, int]] = []

    def breaks(model: nn.Module, phase: int, copy: int) -> None:
        if (phase, copy) == (1, 1):
            raise InterruptedError
        trained.append((phase, copy))
        retrain(model, phase, copy)

    with pytest.raises(InterruptedError):
        prune_retrain_average(model, breaks, sparsity=0.8, phases=2, copies=2, folder=tmp_path)
    assert trained == [(0, 0), (0, 1), (1, 0)]
    again, resumed = [], net()

    def counted(model: nn.Module, phase: int, copy: int) -> None:
        again.append((phase, copy))
        retrain(model, phase, copy)

    prune_retrain_average(resumed, counted, sparsity=0.8, phases=2, copies=2, folder=tmp_path)
    assert again == [(1, 1)]
    assert states_equal(resumed, whole)
    with pytest.raises(ValueError, match="folder must be that of this workflow; it differs in sparsity"):
        prune_retrain_average(net(), retrain, sparsity=0.7, phases=2, copies=2, folder=tmp_path)


@pytest.mark.parametrize(("pair", "expected"), [(0.79, (1,)), (0.80, (1, 0))])
def test_greedy_takes_what_does_not_lower_the_score(pair: float, expected: tuple[int, ...]) -> None:
    assert greedy_choice([0.7, 0.8], lambda members: pair) == expected


def test_a_greedy_soup_is_at_least_the_best_copy() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(nn.functional.mse_loss(model(x), x[:, :3] * 2))

    found = prune_retrain_average(net(), retrain, sparsity=0.5, phases=2, soup="greedy", score=score)
    for scores in found.scores:
        assert scores[-1] >= max(scores[:-1])


def test_batch_norms_need_data_and_get_their_statistics() -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="batches must be given: there are batch norms"):
        prune_retrain_average(normed(), retrain)
    model: Any = normed()
    prune_retrain_average(model, retrain, sparsity=0.5, phases=1, copies=2, batches=lambda: [x])
    torch.testing.assert_close(model[1].running_mean, model[0](x).detach().mean(0))
    assert int(model[1].num_batches_tracked) == 1


def test_a_mean_of_equal_states_is_the_state() -> None:
    state = {"w": torch.randn(50), "n": torch.tensor(3)}
    found = mean_state([state] * 5)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_refusals() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 1.0}, "sparsity"),
        ({"phases": 0}, "phases"),
        ({"copies": 0}, "copies"),
        ({"soup": "best"}, "soup"),
        ({"soup": "greedy"}, "score"),
        ({"scope": "nm"}, "scope"),
        ({"weights": ["9.weight"]}, "weights"),
    ]
    for settings, name in refused:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            prune_retrain_average(net(), retrain, **settings)
    with pytest.raises(ValueError, match="masks must be of parameters of the model"):
        apply_masks(net(), {"9.weight": torch.ones(1, dtype=torch.bool)})
