"""Exact properties of TIES; what every merge method must do is in tests/contracts/test_merges.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.merging.models import equal, merged, one_tensor, random_models, save_model, tensors_of
from tests.reference import ties as reference

M = [[0.9, -0.1, 0.4, -0.7, 0.05], [-0.3, 0.8, 0.4, 0.2, -0.6], [0.5, -0.9, -0.8, 0.1, 0.3]]


def ties(
    tmp_path: Path,
    taus: Any,
    weights: list[float] | None = None,
    *,
    base: list[float] | None = None,
    **settings: Any,
) -> Tensor:
    """Merge models whose task vectors are given, and return the merged task vector."""
    taus = torch.tensor(taus)
    start = torch.zeros(taus.shape[1]) if base is None else torch.tensor(base)
    models = [save_model(tmp_path / f"m{i}", {"w": start + tau}) for i, tau in enumerate(taus)]
    folder = save_model(tmp_path / "base", {"w": start})
    parents = [{"weight": weight} for weight in weights] if weights else None
    return merged(tmp_path, "ties", models, folder, parents=parents, **settings)["w"] - start


@pytest.mark.parametrize(
    ("compat", "expected"),
    [
        ("none", [0.9, -0.9, -0.8, -0.7, -0.6]),
        ("peft", [0.9, -0.9, -0.8, -0.7, -0.6]),
        ("mergekit", [0.9, -0.9, -0.8, -0.7, -0.6]),
        ("reference", [0.7, -0.9, -0.8, -0.7, -0.6]),  # keeps three of each: 0.9 and 0.5 are averaged
    ],
)
def test_a_hand_computed_case(compat: str, expected: list[float], tmp_path: Path) -> None:
    torch.testing.assert_close(ties(tmp_path, M, density=0.4, compat=compat), torch.tensor(expected))


@pytest.mark.parametrize(
    ("compat", "expected"), [("none", [0.9, -0.9, -0.8, -0.7, -0.6]), ("peft", [2.7, -0.9, -0.8, -2.1, -0.6])]
)
def test_weights_count_in_the_election_and_not_after_it(
    compat: str, expected: list[float], tmp_path: Path
) -> None:
    found = ties(tmp_path, M, [3.0, 1.0, 1.0], density=0.4, compat=compat)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("compat", "expected"), [("none", [-0.6, 0.5]), ("peft", [0.4, 0.35])])
def test_a_large_weight_can_turn_the_election(compat: str, expected: list[float], tmp_path: Path) -> None:
    found = ties(tmp_path, [[1.0, 0.5], [-0.6, 0.5]], [0.4, 1.0], density=1.0, compat=compat)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_of_equal_magnitudes_the_first_are_kept(tmp_path: Path) -> None:
    taus = [[1.0, -1.0, 1.0, -1.0]]
    assert ties(tmp_path, taus, density=0.5).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert ties(tmp_path, taus, density=0.5, compat="reference").tolist() == [1.0, -1.0, 1.0, -1.0]


def test_exactly_the_share_is_kept(tmp_path: Path) -> None:
    taus = [[float(x) for x in range(1, 11)]]
    assert ties(tmp_path, taus, density=0.2).tolist() == [0.0] * 8 + [9.0, 10.0]
    assert ties(tmp_path, taus, density=0.2, compat="reference").tolist() == [0.0] * 7 + [8.0, 9.0, 10.0]


def test_a_sum_of_zero_elects_plus(tmp_path: Path) -> None:
    taus = [[0.5, -1.0, 0.2], [-0.5, -1.0, 0.2]]
    torch.testing.assert_close(ties(tmp_path, taus, density=1.0), torch.tensor([0.5, -1.0, 0.2]))
    of_the_code = ties(tmp_path, taus, density=0.999, compat="reference")
    torch.testing.assert_close(of_the_code, torch.tensor([-0.5, -1.0, 0.2]))


def test_weights_that_cancel_leave_zero(tmp_path: Path) -> None:
    # With weights 1 and -1 both entries vote plus, and the sum of their weights is 0.
    assert ties(tmp_path, [[1.0], [-1.0]], [1.0, -1.0], density=1.0).tolist() == [0.0]


@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 2.0, -0.5]])
def test_equals_the_reference(elect: str, combine: str, weights: list[float] | None, tmp_path: Path) -> None:
    taus = torch.randn(4, 400, generator=torch.Generator().manual_seed(3))
    wanted = reference.merge(taus, 0.35, weights, elect=elect, combine=combine)
    found = ties(tmp_path, taus.tolist(), weights, density=0.35, elect=elect, combine=combine)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)  # fp32 sums of four


@pytest.mark.parametrize("compat", ["reference", "peft", "mergekit"])
def test_the_other_rules_equal_their_references(compat: str, tmp_path: Path) -> None:
    taus = torch.randn(3, 500, generator=torch.Generator().manual_seed(5))
    weights = None if compat == "reference" else [0.5, 1.0, 1.5]
    wanted = reference.merge(taus, 0.3, weights, rule=compat)
    found = ties(tmp_path, taus.tolist(), weights, density=0.3, compat=compat)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def by_hand(folders: list[Path], density: float) -> Tensor:
    """Return the global merge of whole models, their tensors laid end to end in the order of names."""
    flat = [torch.cat([v.float().reshape(-1) for _, v in sorted(tensors_of(f).items())]) for f in folders]
    taus = torch.stack([one - flat[0] for one in flat[1:]])
    count = int(density * taus.shape[1] + 1e-9)
    for tau in taus:
        order = torch.sort(tau.abs(), descending=True, stable=True).indices
        tau[order[count:]] = 0.0
    positive = taus.sum(dim=0) >= 0
    agree = torch.where(positive, taus > 0, taus < 0)
    merged_tau = (taus * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    return flat[0] + merged_tau


@pytest.mark.parametrize("block_bytes", [65536, 131072, 1 << 22])
def test_the_global_ranking_covers_all_tensors_and_equal_entries_go_by_name(
    block_bytes: int, tmp_path: Path
) -> None:
    # bf16 differences: thousands of entries share the threshold's magnitude.
    folders = random_models(tmp_path, 4)
    found = merged(
        tmp_path,
        "ties",
        folders[1:],
        folders[0],
        options={"block_bytes": block_bytes, "dtype": "float32"},
        density=0.3,
    )
    flat = torch.cat([value.reshape(-1) for _, value in sorted(found.items())])
    torch.testing.assert_close(flat, by_hand(folders, 0.3), rtol=0.0, atol=1e-6)


def test_without_memory_for_positions_a_further_pass_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = random_models(tmp_path, 4)
    options = {"block_bytes": 65536}
    for scope in ("global", "tensor"):
        one = merged(tmp_path, "ties", folders[1:], folders[0], options=options, density=0.3, scope=scope)
        with monkeypatch.context() as patch:
            patch.setattr("hf_ext.merging.ties._REMEMBERED", 0)
            settings: dict[str, Any] = {"density": 0.3, "scope": scope}
            assert equal(merged(tmp_path, "ties", folders[1:], folders[0], options=options, **settings), one)


def test_the_support_is_no_larger_than_what_is_kept(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    base = tensors_of(folders[0])
    entries = sum(value.numel() for value in base.values())
    found = merged(tmp_path, "ties", folders[1:], folders[0], options={"dtype": "float32"}, density=0.01)
    changed = sum(int((found[name] != base[name].float()).sum()) for name in base)
    assert 0 < changed <= 2 * int(0.01 * entries)


def test_order_and_scale_of_weights_do_not_matter(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4)
    weights = [{"weight": w} for w in (0.5, 1.0, 2.0)]
    one = merged(tmp_path, "ties", folders[1:], folders[0], parents=weights, density=0.4)
    again = merged(tmp_path, "ties", folders[:0:-1], folders[0], parents=weights[::-1], density=0.4)
    larger = [{"weight": 4.0 * w["weight"]} for w in weights]
    scaled = merged(tmp_path, "ties", folders[1:], folders[0], parents=larger, density=0.4)
    for name in one:
        # Sums in another order differ in the last bit, which rounding to bf16 hides or moves by one unit.
        torch.testing.assert_close(one[name].float(), again[name].float(), rtol=2**-7, atol=1e-6)
    assert equal(one, scaled), "a power of two changes no bit"


def test_one_model_untrimmed_is_the_scaled_change(tmp_path: Path) -> None:
    found = ties(tmp_path, [[0.5, -0.25, 0.0]], density=1.0, lambda_=2.0, base=[1.0, 1.0, 1.0])
    assert found.tolist() == [1.0, -0.5, 0.0]


def test_entries_lie_between_those_that_agree(tmp_path: Path) -> None:
    taus = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    found = ties(tmp_path, taus.tolist(), [1.0, 2.0, 0.5, 3.0, 1.0], density=0.5)
    kept = torch.stack([reference.trim(tau, 0.5) for tau in taus])
    high = kept.clamp(min=0).max(dim=0).values
    low = kept.clamp(max=0).min(dim=0).values
    assert bool(((found <= high + 1e-6) & (found >= low - 1e-6)).all())


def test_a_density_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"density must be enough to keep one of 5 entries, got 0\.1"):
        ties(tmp_path, M, density=0.1)
    assert not (tmp_path / "out").exists()


def test_different_densities_cannot_be_ranked_together(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    density = [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]
    with pytest.raises(ValueError, match="density must be the same for all tensors"):
        merged(tmp_path, "ties", folders[1:], folders[0], density=density)
    merged(tmp_path, "ties", folders[1:], folders[0], density=density, scope="tensor")


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    base, other = one_tensor(tmp_path, [1.0, 2.0, 3.0], [1.0, float("nan"), 3.0])
    with pytest.raises(ValueError, match=r"w: NaN or infinite values in m1"):
        merged(tmp_path, "ties", [other], base, density=0.5)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_mergekits_normalize_is_the_mean_or_the_sum(tmp_path: Path) -> None:
    taus = [[1.0, 1.0], [3.0, -2.0]]
    assert ties(tmp_path, taus, density=1.0, normalize=True).tolist() == [2.0, -2.0]
    assert ties(tmp_path, taus, density=1.0, normalize=False).tolist() == [4.0, -2.0]
    with pytest.raises(ValueError, match="normalize must be 'mean'"):
        ties(tmp_path, taus, density=1.0, normalize=True, combine="sum")


def test_the_election_by_count_ignores_size(tmp_path: Path) -> None:
    taus = [[5.0], [-1.0], [-2.0]]
    assert ties(tmp_path, taus, density=1.0).tolist() == [5.0]
    assert ties(tmp_path, taus, density=1.0, elect="count").tolist() == [-1.5]
