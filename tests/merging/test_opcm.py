"""Exact properties of OPCM; what every merge method must do is in tests/contracts/test_merges.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_ext.merging import merge
from hf_ext.merging.opcm import novelty, taken
from tests.merging.models import equal, merged, one_tensor, random_models, same_bits, save_model, tensors_of
from tests.reference import opcm as reference

M, ONES = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(3, 3)
FP32 = {"dtype": "float32"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "r"), [(0.0, 0), (0.4, 0), (0.5, 1), (0.7, 1), (0.9, 2), (0.9999, 2)])
def test_how_many_directions_are_taken(alpha: float, r: int) -> None:
    assert taken(torch.tensor([3.0, 2.0, 1.0]), alpha) == r


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.4, (ONES - torch.eye(3)).tolist()),
        (0.5, (ONES - torch.eye(3)).tolist()),
        (0.7, (ONES - torch.eye(3)).tolist()),
        (0.9, [[0, 0, 1], [0, 0, 1], [1, 1, 0]]),
    ],
)
def test_a_hand_computed_case(alpha: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(novelty(M, ONES, alpha), torch.tensor(expected).float())


def test_without_the_cross_blocks_the_taken_rows_and_columns_stay_untouched() -> None:
    found = novelty(M, ONES, 0.5, drop_cross=True)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0]]))


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (3, 3), (70, 90), (1, 6), (6, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("drop_cross", [False, True])
def test_the_thin_form_equals_the_full_one(shape: tuple[int, int], alpha: float, drop_cross: bool) -> None:
    m, t = random(*shape), random(*shape, seed=1)
    wanted = reference.project(m, t, alpha, drop_cross)
    torch.testing.assert_close(
        novelty(m, t, alpha, drop_cross=drop_cross).double(), wanted, rtol=0, atol=2e-5
    )


def test_what_rounding_adds_to_a_change_of_low_rank_does_not_matter() -> None:
    m, t = random(80, 4) @ random(4, 70, seed=1), random(80, 70, seed=2)
    noisy = m + 1e-7 * float(m.abs().max()) * random(80, 70, seed=3)
    torch.testing.assert_close(novelty(noisy, t, 0.5), novelty(m, t, 0.5), rtol=0, atol=1e-4)


def test_what_is_added_is_orthogonal_to_what_is_there() -> None:
    for seed in range(5):
        m, t = random(80, 70, seed=seed), random(80, 70, seed=seed + 50)
        c = novelty(m, t, 0.5)
        assert abs(float((c * m).sum())) <= 1e-5 * float(m.norm()) * float(t.norm())
        assert float(c.norm()) < float(t.norm())


def test_a_rank_deficient_change_and_none_at_all() -> None:
    m = random(20, 3) @ random(3, 30, seed=1)
    t = random(20, 30, seed=2)
    c = novelty(m, t, 0.5)
    torch.testing.assert_close(c.double(), reference.project(m, t, 0.5), rtol=0, atol=2e-5)
    assert abs(float((c.double() * m.double()).sum())) < 1e-4
    assert torch.equal(novelty(torch.zeros(4, 5), random(4, 5), 0.5), random(4, 5))


# The merge ----------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "opcm" / "scalars.json").read_text())


def test_vectors_are_added_and_brought_to_the_mean_norm(tmp_path: Path) -> None:
    base, *models = one_tensor(tmp_path, [0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, -2.0])
    two = merged(tmp_path, "opcm", models[:2], base)["w"]
    torch.testing.assert_close(two, torch.tensor([2.1, 2.8]))
    assert scalars(tmp_path / "out")["lambda"] == pytest.approx(5 / 3.5, rel=1e-12)
    three = merged(tmp_path, "opcm", models, base)["w"]
    torch.testing.assert_close(three, torch.tensor([2.496151, 1.664101]))
    assert scalars(tmp_path / "out") == {
        "lambda": pytest.approx(1.2018504, rel=1e-6), "norms": [3.0, 4.0, 2.0], "models": ["m1", "m2", "m3"],
    }  # fmt: skip


@pytest.mark.parametrize("drop_cross", [False, True])
def test_equals_the_reference(drop_cross: bool, tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4, dtype=torch.float32)
    names = {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}
    base, *models = [tensors_of(folder) for folder in folders]
    wanted, scales = reference.merge(base, models, 0.6, names, drop_cross=drop_cross)
    found = merged(tmp_path, "opcm", folders[1:], folders[0], alpha=0.6, drop_cross=drop_cross)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=0, atol=1e-5)
    assert scalars(tmp_path / "out")["lambda"] == pytest.approx(scales[-1], rel=1e-6)


def test_the_merged_change_has_the_mean_norm_of_all(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 5, dtype=torch.float32)
    base = tensors_of(folders[0])

    def length(tensors: dict[str, Tensor]) -> float:
        return reference.norm({name: tensors[name].double() - base[name].double() for name in base})

    for count in range(1, 5):
        found = merged(tmp_path, "opcm", folders[1 : 1 + count], folders[0])
        mean = sum(length(tensors_of(folder)) for folder in folders[1 : 1 + count]) / count
        assert length(found) == pytest.approx(mean, rel=2e-6)


def test_the_order_of_the_models_counts_but_only_a_little(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4, dtype=torch.float32)
    one = merged(tmp_path, "opcm", folders[1:], folders[0])
    other = merged(tmp_path, "opcm", folders[:0:-1], folders[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])
    torch.testing.assert_close(
        one["model.layers.0.norm.weight"], other["model.layers.0.norm.weight"], rtol=1e-2, atol=1e-3
    )


def test_which_tensors_are_projected(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3, dtype=torch.float32)
    usual = merged(tmp_path, "opcm", folders[1:], folders[0])
    none = merged(tmp_path, "opcm", folders[1:], folders[0], matrices=["no.such.name"])
    a, b, base = (tensors_of(folders[i]) for i in (1, 2, 0))
    scale = merged_scale(tmp_path)
    for name, value in none.items():
        wanted = base[name] + (a[name] - base[name] + b[name] - base[name]) / scale
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)
    whole = merged(tmp_path, "opcm", folders[1:], folders[0], matrices=["*"])
    head = "lm_head.weight"
    assert not torch.allclose(usual[head] - base[head], whole[head] - base[head], rtol=0.2)


def merged_scale(tmp_path: Path) -> float:
    return scalars(tmp_path / "out")["lambda"]


def test_convolutions_are_projected_on_demand(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / f"m{i}", {"conv.weight": random(6, 4, 3, 3, seed=i)}) for i in range(3)]
    plain = merged(tmp_path, "opcm", folders[1:], folders[0])
    projected = merged(tmp_path, "opcm", folders[1:], folders[0], include_conv=True)
    base, *models = [{"conv.weight": tensors_of(f)["conv.weight"].flatten(1)} for f in folders]
    wanted, _ = reference.merge(base, models, 0.5, {"conv.weight"})
    torch.testing.assert_close(
        projected["conv.weight"].flatten(1).double(), wanted["conv.weight"], rtol=0, atol=1e-5
    )
    assert not torch.allclose(plain["conv.weight"], projected["conv.weight"])


# Later models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_added_later_give_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4, dtype=dtype)
    at_once = merged(tmp_path, "opcm", folders[1:], folders[0], out="once", keep_state=True)
    merged(tmp_path, "opcm", folders[1:2], folders[0], out="one", keep_state=True)
    merged(
        tmp_path,
        "opcm",
        folders[2:3],
        folders[0],
        out="two",
        keep_state=True,
        continue_from=str(tmp_path / "one"),
    )
    for folder in (*folders[1:3], tmp_path / "one"):
        shutil.rmtree(folder)  # neither the earlier models nor the sum before the last are needed
    later = merged(
        tmp_path,
        "opcm",
        folders[3:],
        folders[0],
        out="three",
        keep_state=True,
        continue_from=str(tmp_path / "two"),
    )
    assert equal(later, at_once)
    sums = [load_file(tmp_path / name / "opcm" / "sum.safetensors") for name in ("once", "three")]
    assert equal(*sums)
    states = [json.loads((tmp_path / name / "opcm" / "state.json").read_text()) for name in ("once", "three")]
    assert states[0] == states[1]
    assert states[0]["models"] == ["m1", "m2", "m3"]


def test_the_kept_sum_is_lambda_times_the_merged_change(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3, dtype=torch.float32)
    found = merged(tmp_path, "opcm", folders[1:], folders[0], keep_state=True)
    state = json.loads((tmp_path / "out" / "opcm" / "state.json").read_text())
    sums, base = load_file(tmp_path / "out" / "opcm" / "sum.safetensors"), tensors_of(folders[0])
    assert list(sums) == list(found)
    for name, value in sums.items():
        torch.testing.assert_close(value, state["lambda"] * (found[name] - base[name]), rtol=0, atol=1e-5)


def test_the_sums_are_hashed_in_the_manifest(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 2)
    merged(tmp_path, "opcm", folders[1:], folders[0], keep_state=True)
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert {"opcm/state.json", "opcm/sum.safetensors"} <= set(manifest["output"])
    assert str(tmp_path) not in (tmp_path / "out" / "opcm" / "state.json").read_text()


def test_another_base_or_other_tensors_are_refused(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4)
    merged(tmp_path, "opcm", folders[1:2], folders[0], out="one", keep_state=True)
    merged(tmp_path, "opcm", folders[1:2], folders[0], out="bare")
    with pytest.raises(
        ValueError, match=r"continue_from must be an earlier merge onto the same base.*lm_head\.weight"
    ):
        merged(tmp_path, "opcm", folders[3:], folders[2], continue_from=str(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"continue_from must be an earlier merge with keep_state"):
        merged(tmp_path, "opcm", folders[3:], folders[0], continue_from=str(tmp_path / "bare"))
    others = [save_model(tmp_path / f"o{i}", {"w": torch.ones(2) * i}) for i in range(2)]
    with pytest.raises(
        ValueError, match=r"continue_from must be an earlier merge of models with the same tensors"
    ):
        merged(tmp_path, "opcm", others[1:], others[0], continue_from=str(tmp_path / "one"))
    file = tmp_path / "one" / "opcm" / "sum.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"sum\.safetensors is damaged"):
        merged(tmp_path, "opcm", folders[3:], folders[0], continue_from=str(tmp_path / "one"))
    assert not (tmp_path / "out").exists()


def test_a_model_equal_to_the_base_is_warned_of(tmp_path: Path) -> None:
    base, same, other = one_tensor(tmp_path, [1.0, 1.0], [1.0, 1.0], [1.0, 3.0])
    with pytest.warns(UserWarning, match="m1 equals the base"):
        found = merged(tmp_path, "opcm", [same, other], base)["w"]
    assert found.tolist() == [1.0, 2.0], "half of the only change: the mean of the norms 0 and 2"


def test_an_interrupted_merge_goes_on_after_the_pass_over_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_ext.merging import Opcm

    folders = random_models(tmp_path, 3)
    wanted = merged(tmp_path, "opcm", folders[1:], folders[0], out="whole", keep_state=True)
    content = {
        "merge_method": "opcm", "base_model": str(folders[0]), "models": [str(f) for f in folders[1:]],
        "parameters": {"keep_state": True},
    }  # fmt: skip

    def stop(self: object, block: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Opcm, "map", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(content, tmp_path / "out", progress=False)

    def once(self: object, number: int, block: object) -> None:
        raise AssertionError("the pass was done")

    monkeypatch.setattr(Opcm, "scan", once)
    assert merge(content, tmp_path / "out", progress=False).resumed
    assert equal(tensors_of(tmp_path / "out"), wanted)
    pair = [load_file(tmp_path / name / "opcm" / "sum.safetensors") for name in ("whole", "out")]
    assert all(same_bits(pair[0][name], pair[1][name]) for name in pair[0])


def test_updates_of_adapters_are_merged_into_the_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"layer.weight": random(12, 10)})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"], "bias": "none"}
    adapters, updates = [], []
    for number in range(2):
        a, b = random(2, 10, seed=5 + number), random(12, 2, seed=9 + number)
        folder = tmp_path / f"a{number}"
        save_model(
            folder, {"base_model.model.layer.lora_A.weight": a, "base_model.model.layer.lora_B.weight": b}
        )
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        adapters.append(folder)
        updates.append(2.0 * b @ a)
    found = merged(tmp_path, "opcm", adapters, base, options={"space": "merge_into_base"})["layer.weight"]
    start = tensors_of(base)
    models = [{"layer.weight": start["layer.weight"] + update} for update in updates]
    wanted, _ = reference.merge(start, models, 0.5, {"layer.weight"})
    torch.testing.assert_close(found.double(), wanted["layer.weight"], rtol=0, atol=2e-5)
    lora = merged(tmp_path, "opcm", adapters, out="lora", options={"space": "product", "out_rank": 10})
    name = "base_model.model.layer.lora_"
    update = lora[f"{name}B.weight"] @ lora[f"{name}A.weight"]
    torch.testing.assert_close(update, found - start["layer.weight"], rtol=0, atol=2e-5)
