"""Exact properties of RMM: bases, stores of adapters, and what is restored from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ext.cli import main
from hf_ext.merging import add_adapter, read_store, restore_adapter, restore_state, store_adapters
from hf_ext.merging._basis import aligned, energies, fitted, leading_basis, product_error
from tests.conftest import ModelFactory
from tests.merging.models import merged, random_models, same_bits, save_model, tensors_of
from tests.reference import rmm as reference

X = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])[None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rebuilt(x: Tensor, p: int) -> Tensor:
    basis, coefficients = leading_basis(x, p)
    return basis @ coefficients


# Bases --------------------------------------------------------------------------------------------


def test_a_hand_computed_basis() -> None:
    torch.testing.assert_close(energies(X).sqrt(), torch.tensor([6.0, 1.0]).double().sqrt())
    found = rebuilt(X, 1)[0]
    torch.testing.assert_close(found, torch.tensor([[0.8, 2.0, 0.4], [0.4, 1.0, 0.2]]).double())
    assert float((found - X[0]).square().sum()) == pytest.approx(1.0, rel=1e-12)
    assert float((rebuilt(X, 2)[0] - X[0]).square().sum()) < 1e-20


def test_a_mean_and_one_vector_are_worse_than_two_vectors() -> None:
    mean = X.mean(dim=2, keepdim=True)
    centered = mean + rebuilt(X - mean, 1)
    assert float((centered - X).square().sum()) == pytest.approx(2 / 3, rel=1e-6)


@pytest.mark.parametrize(("d", "n"), [(16, 3), (3, 16), (5, 5)])
def test_the_squared_error_is_what_the_spectrum_leaves_out(d: int, n: int) -> None:
    x = random(7, d, n).double()
    spectrum = torch.linalg.svdvals(x).square().sum(dim=0)
    torch.testing.assert_close(energies(x), spectrum)
    errors = [float((rebuilt(x, p) - x).square().sum()) for p in range(1, min(d, n) + 1)]
    for p, error in enumerate(errors, start=1):
        assert error == pytest.approx(float(spectrum[p:].sum()), rel=1e-9, abs=1e-18)
    assert errors == sorted(errors, reverse=True)


def test_the_gram_form_spans_what_the_svd_does() -> None:
    x = random(4, 30, 6).double()
    basis, _ = leading_basis(x, 3)
    u = torch.linalg.svd(x, full_matrices=False).U[..., :3]
    cosines = torch.linalg.svdvals(basis.mT @ u)
    assert float(cosines.min()) > 1 - 1e-12


def test_directions_that_are_not_there_are_zero() -> None:
    x = torch.zeros(3, 8, 4)
    x[1, :, 0], x[1, :, 2] = 1.0, 2.0  # rank 1
    basis, coefficients = leading_basis(x, 3)
    assert bool(torch.isfinite(basis).all())
    assert bool(torch.isfinite(coefficients).all())
    torch.testing.assert_close(basis @ coefficients, x.double())
    assert basis[1].norm(dim=0)[1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    torch.testing.assert_close(basis @ fitted(basis, x), x.double())


def test_turning_factors_leaves_the_product() -> None:
    first, second = (random(4, 20), random(30, 4, seed=1)), (random(4, 20, seed=2), random(30, 4, seed=3))
    a, b = aligned(*second, first)
    torch.testing.assert_close(b @ a, (second[1] @ second[0]).double(), rtol=0, atol=1e-5)
    before = (second[0] - first[0]).square().sum() + (second[1] - first[1]).square().sum()
    assert float((a - first[0]).square().sum() + (b - first[1]).square().sum()) < float(before)
    turn = torch.linalg.qr(random(4, 4, seed=7)).Q
    a, b = aligned(turn @ first[0], first[1] @ turn.T, first)
    torch.testing.assert_close(a, first[0].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(b, first[1].double(), rtol=0, atol=1e-5)


def test_the_error_of_a_product() -> None:
    a, b, a_hat, b_hat = random(3, 9), random(8, 3, seed=1), random(3, 9, seed=2), random(8, 3, seed=3)
    wanted = float((b_hat @ a_hat - b @ a).norm() / (b @ a).norm())
    assert product_error(a, b, a_hat, b_hat) == pytest.approx(wanted, rel=1e-5)
    assert product_error(a, b, a, b) == 0.0
    assert product_error(a, 0 * b, a, 0 * b) == 0.0


# Stores -------------------------------------------------------------------------------------------

SHAPES = {"model.layers.0.q_proj": (24, 40), "model.layers.0.v_proj": (16, 40)}


def adapter(folder: Path, seed: int, r: int = 16, noise: float = 1.0, **options: Any) -> Path:
    """Write a LoRA whose factors are a common part and noise of its own."""
    tensors = {}
    for number, (module, (out_features, in_features)) in enumerate(SHAPES.items()):
        for side, shape in (("A", (r, in_features)), ("B", (out_features, r))):
            place = 100 * number + (side == "B")
            value = random(*shape, seed=place) + noise * random(*shape, seed=place + 1000 * (seed + 1))
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = value
    tensors.update(options.pop("extra", {}))
    folder.mkdir(parents=True)
    dtype = options.pop("dtype", torch.float32)
    save_file(
        {name: value.to(dtype) for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return folder


def adapters(tmp_path: Path, count: int, **options: Any) -> list[Path]:
    return [adapter(tmp_path / f"a{number}", number, **options) for number in range(count)]


def update(tensors: dict[str, Tensor], module: str) -> Tensor:
    name = f"base_model.model.{module}"
    return tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()


@pytest.mark.parametrize("granularity", ["position", "tensor"])
@pytest.mark.parametrize("center", [False, True])
def test_what_is_restored_equals_the_reference(granularity: str, center: bool, tmp_path: Path) -> None:
    folders = adapters(tmp_path, 5)
    store_adapters(
        folders, tmp_path / "s", basis_size=2, granularity=granularity, center=center, dtype="float32"
    )
    originals = [tensors_of(folder) for folder in folders]
    for name in originals[0]:
        turn = (lambda v: v.T) if "lora_A" in name else (lambda v: v)
        wanted = reference.rebuild_factors([turn(o[name]) for o in originals], 2, granularity, center)
        for number, value in enumerate(wanted):
            found = restore_state(tmp_path / "s", f"a{number}")[name]
            torch.testing.assert_close(turn(found).double(), value, rtol=0, atol=1e-5)


def test_one_basis_for_a_layer_is_that_of_both_factors_together(tmp_path: Path) -> None:
    folders = adapters(tmp_path, 4)
    store_adapters(folders, tmp_path / "s", basis_size=2, granularity="layer", dtype="float32")
    originals = [tensors_of(folder) for folder in folders]
    for module in SHAPES:
        names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        x = torch.stack(
            [torch.cat([o[names[0]].T.reshape(-1), o[names[1]].reshape(-1)]) for o in originals], dim=1
        )
        wanted = reference.rebuild(x, 2)
        for number in range(4):
            found = restore_state(tmp_path / "s", f"a{number}")
            flat = torch.cat([found[names[0]].T.reshape(-1), found[names[1]].reshape(-1)])
            torch.testing.assert_close(flat.double(), wanted[:, number], rtol=0, atol=1e-5)


def test_sizes_follow_the_formula(tmp_path: Path) -> None:
    folders = adapters(tmp_path, 8, r=16)
    report = store_adapters(folders, tmp_path / "s", basis_size=2, dtype="float32")
    assert report.stored_bytes / report.adapter_bytes == 2 * (16 + 8) / (16 * 8) == 0.375
    stored = load_file(tmp_path / "s" / "rmm.safetensors")
    assert sum(value.numel() * 4 for value in stored.values()) == report.stored_bytes
    positions = sum(sum(shape) for shape in SHAPES.values())
    assert report.stored_bytes == 4 * positions * 2 * (16 + 8)
    by_tensor = store_adapters(folders, tmp_path / "t", basis_size=2, dtype="float32", granularity="tensor")
    assert by_tensor.stored_bytes == 4 * (2 * 16 * positions + 4 * 2 * 8)
    half = store_adapters(folders, tmp_path / "h", basis_size=2)
    assert half.stored_bytes * 2 == report.stored_bytes


@pytest.mark.parametrize("granularity", ["position", "tensor", "layer"])
def test_where_a_basis_saves_nothing_factors_are_stored_as_they_are(granularity: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, 3, r=4)
    size = 2 if granularity == "position" else 3  # 2 (4 + 3) is no less than 4 x 3
    report = store_adapters(
        folders, tmp_path / "s", basis_size=size, granularity=granularity, dtype="float32"
    )
    assert report.stored_bytes == report.adapter_bytes
    for folder in folders:
        own, found = tensors_of(folder), restore_state(tmp_path / "s", folder.name)
        assert all(same_bits(own[name], found[name]) for name in own)
    assert set(report.errors.values()) == {0.0}


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_reported_errors_are_those_of_what_is_restored(align: bool, dtype: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, 6)
    report = store_adapters(folders, tmp_path / "s", basis_size=3, align=align, dtype=dtype)
    for folder in folders:
        own, found = tensors_of(folder), restore_state(tmp_path / "s", folder.name)
        wrong = sum(float((update(found, m) - update(own, m)).square().sum()) for m in SHAPES)
        whole = sum(float(update(own, m).square().sum()) for m in SHAPES)
        assert report.errors[folder.name] == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
        assert 0.01 < report.errors[folder.name] < 1.0


def test_turning_finds_what_equal_adapters_in_other_frames_share(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a0", 0, noise=0.0)
    tensors = tensors_of(first)
    for number in (1, 2):
        turn = torch.linalg.qr(random(16, 16, seed=number)).Q
        (tmp_path / f"a{number}").mkdir()
        turned = {n: turn @ v if "lora_A" in n else v @ turn.T for n, v in tensors.items()}
        save_file(
            {n: v.contiguous() for n, v in turned.items()},
            tmp_path / f"a{number}" / "adapter_model.safetensors",
        )
        (tmp_path / f"a{number}" / "adapter_config.json").write_text(
            (first / "adapter_config.json").read_text()
        )
    folders = [tmp_path / f"a{number}" for number in range(3)]
    plain = store_adapters(folders, tmp_path / "p", basis_size=1, dtype="float32")
    turned = store_adapters(folders, tmp_path / "t", basis_size=1, dtype="float32", align=True)
    assert max(plain.errors.values()) > 0.3
    assert max(turned.errors.values()) < 1e-5


@pytest.mark.parametrize("granularity", ["position", "tensor"])
def test_a_budget_is_kept_and_spent_where_it_helps(granularity: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, 6)
    for folder in folders:  # lora_A of one module is the same in all adapters: one vector is enough
        tensors = tensors_of(folder)
        name = "base_model.model.model.layers.0.q_proj.lora_A.weight"
        tensors[name] = random(16, 40, seed=77)
        save_file(tensors, folder / "adapter_model.safetensors")
    errors = []
    for budget in (0.3, 0.5, 0.7, 0.9):
        out = tmp_path / f"s{budget}"
        report = store_adapters(folders, out, budget=budget, granularity=granularity, dtype="float32")
        assert 0.5 * budget * report.adapter_bytes < report.stored_bytes <= budget * report.adapter_bytes
        sizes = {k: v.shape[-1] for k, v in load_file(out / "rmm.safetensors").items() if k.endswith("basis")}
        assert sizes["model.layers.0.q_proj.lora_A.basis"] == 1
        errors.append(max(report.errors.values()))
    assert errors == sorted(errors, reverse=True)
    uniform = store_adapters(folders, tmp_path / "u", basis_size=2, granularity=granularity, dtype="float32")
    share = uniform.stored_bytes / uniform.adapter_bytes
    spread = store_adapters(folders, tmp_path / "b", budget=share, granularity=granularity, dtype="float32")
    assert max(spread.errors.values()) < max(uniform.errors.values())
    with pytest.raises(ValueError, match=r"budget must be at least \d+ bytes"):
        store_adapters(folders, tmp_path / "x", budget=0.01, granularity=granularity)


def test_ranks_and_modules_may_differ_between_adapters(tmp_path: Path) -> None:
    small = adapter(tmp_path / "small", 0, r=4)
    large = adapter(tmp_path / "large", 1, r=16)
    part = adapter(tmp_path / "part", 2, r=8)
    kept = {n: v for n, v in tensors_of(part).items() if "q_proj" in n}
    save_file(kept, part / "adapter_model.safetensors")
    store_adapters([small, large, part], tmp_path / "s", basis_size=3, dtype="float32")
    for folder in (small, large, part):
        own, found = tensors_of(folder), restore_state(tmp_path / "s", folder.name)
        assert sorted(own) == sorted(found)
        for name in own:
            torch.testing.assert_close(found[name], own[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="align must be False, where ranks differ"):
        store_adapters([small, large], tmp_path / "x", basis_size=1, align=True)


def test_what_was_trained_whole_is_kept_by_itself(tmp_path: Path) -> None:
    folders = []
    for number in range(2):
        extra = {"base_model.model.lm_head.weight": random(6, 5, seed=number)}
        folders.append(adapter(tmp_path / f"a{number}", number, extra=extra, modules_to_save=["lm_head"]))
    report = store_adapters(folders, tmp_path / "s", basis_size=1)
    for number in range(2):
        found = restore_state(tmp_path / "s", f"a{number}")["base_model.model.lm_head.weight"]
        assert torch.equal(found, random(6, 5, seed=number))
    assert report.stored_bytes < report.adapter_bytes


def test_a_restored_adapter_computes_what_the_original_does(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = torch.tensor([[1, 5, 9, 3]])
    tiny_llama(seed=0).save_pretrained(tmp_path / "base")
    wanted = {}
    for number in range(3):
        model = get_peft_model(
            tiny_llama(seed=0),
            LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        )
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0.0, 0.1, generator=generator)
        model.eval().save_pretrained(tmp_path / f"a{number}")
        wanted[f"a{number}"] = model(ids).logits.detach()
    store_adapters([tmp_path / name for name in wanted], tmp_path / "s", basis_size=3, dtype="float32")
    plain = tiny_llama(seed=0).eval()(ids).logits
    for name, logits in wanted.items():
        restore_adapter(tmp_path / "s", name, tmp_path / f"r-{name}")
        model = PeftModel.from_pretrained(tiny_llama(seed=0), tmp_path / f"r-{name}").eval()
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
        assert not torch.allclose(logits, plain, atol=1e-2)
    restore_adapter(tmp_path / "s", "a1", tmp_path / "full", base=tmp_path / "base")
    whole = type(tiny_llama(seed=0)).from_pretrained(tmp_path / "full").eval()
    torch.testing.assert_close(whole(ids).logits, wanted["a1"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "tensor"}, {"granularity": "layer"}, {"center": True}, {"align": True}]
)
def test_an_adapter_added_later_lies_on_the_bases_that_are_there(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folders = adapters(tmp_path, 4)
    size = 1 if options.get("center") else 2  # a mean and two vectors hold three adapters wholly
    store_adapters(folders[:3], tmp_path / "s", basis_size=size, dtype="float32", **options)
    before = {folder.name: restore_state(tmp_path / "s", folder.name) for folder in folders[:3]}
    own = tensors_of(folders[0])
    # The first one's own rebuilt form lies in the bases: it comes back as it is.
    (tmp_path / "inside").mkdir()
    save_file(before["a1"], tmp_path / "inside" / "adapter_model.safetensors")
    (tmp_path / "inside" / "adapter_config.json").write_text((folders[0] / "adapter_config.json").read_text())
    inside = add_adapter(tmp_path / "s", tmp_path / "inside")
    report = add_adapter(tmp_path / "s", folders[3])
    assert report.names == ("a0", "a1", "a2", "inside", "a3")
    if not options.get("align"):  # turned towards the first, it leaves the bases
        assert inside.errors["inside"] < 1e-5
    assert 0.1 < report.errors["a3"] < 1.5
    for name, state in before.items():
        found = restore_state(tmp_path / "s", name)
        for key in own:
            torch.testing.assert_close(found[key], state[key], rtol=0, atol=1e-6)
    found = restore_state(tmp_path / "s", "a3")
    wrong = sum(float((update(found, m) - update(tensors_of(folders[3]), m)).square().sum()) for m in SHAPES)
    whole = sum(float(update(tensors_of(folders[3]), m).square().sum()) for m in SHAPES)
    assert report.errors["a3"] == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)


def test_the_adapters_own_type_and_config_come_back(tmp_path: Path) -> None:
    folders = adapters(tmp_path, 2, dtype=torch.bfloat16)
    store_adapters({"one": folders[0], "two": folders[1]}, tmp_path / "s", basis_size=2)
    restore_adapter(tmp_path / "s", "two", tmp_path / "r")
    found, own = tensors_of(tmp_path / "r"), tensors_of(folders[1])
    assert all(same_bits(found[name], own[name]) for name in own), "stored whole, in their own type"
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "r", folders[1])]
    assert configs[0] == configs[1]
    assert read_store(tmp_path / "s").names == ("one", "two")
    assert str(tmp_path) not in (tmp_path / "s" / "rmm_config.json").read_text()


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"basis_size": 0}, "basis_size must be between 1 and 2"),
        ({"basis_size": 3}, "basis_size must be between 1 and 2"),
        ({"budget": 1.5}, "budget must be above 0 and at most 1"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, 2)
    with pytest.raises(ValueError, match=text):
        store_adapters(folders, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", 0)
    dora = adapter(tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(ValueError, match="use_dora must be off"):
        store_adapters([first, dora], tmp_path / "s")
    module = "base_model.model.model.embed_tokens"
    sides = {f"{module}.lora_embedding_{side}": torch.ones(16, 16) for side in "AB"}
    embedding = adapter(tmp_path / "embedding", 1, extra=sides)
    with pytest.raises(ValueError, match="target_modules must be without embeddings and heads"):
        store_adapters([first, embedding], tmp_path / "s")
    other = adapter(tmp_path / "other", 1)
    tensors = tensors_of(other)
    name = "base_model.model.model.layers.0.v_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"v_proj must be of one shape in all adapters"):
        store_adapters([first, other], tmp_path / "s")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"v_proj\.lora_B must be finite.*other"):
        store_adapters([first, other], tmp_path / "s")
    with pytest.raises(ValueError, match="must be given with names"):
        store_adapters([first, tmp_path / "x" / "a"], tmp_path / "s")
    whole = save_model(tmp_path / "model", {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="folders of LoRA adapters"):
        store_adapters([whole], tmp_path / "s", basis_size=1)
    assert not (tmp_path / "s").exists()


def test_a_damaged_store_and_unknown_names_are_refused(tmp_path: Path) -> None:
    folders = adapters(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="no store of adapters"):
        restore_state(tmp_path / "none", "a0")
    store_adapters(folders, tmp_path / "s", basis_size=1)
    with pytest.raises(ValueError, match="name must be one of 'a0', 'a1', got 'a2'"):
        restore_adapter(tmp_path / "s", "a2", tmp_path / "r")
    with pytest.raises(ValueError, match="name must be one that is not taken"):
        add_adapter(tmp_path / "s", folders[0])
    with pytest.raises(ValueError, match="out must be a new folder"):
        store_adapters(folders, tmp_path / "s")
    with pytest.raises(ValueError, match="out must be an earlier result"):
        store_adapters(folders, folders[0], overwrite=True)
    store_adapters(folders, tmp_path / "s", basis_size=2, overwrite=True)
    file = tmp_path / "s" / "rmm.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"rmm\.safetensors is damaged"):
        restore_state(tmp_path / "s", "a0")
    assert not (tmp_path / "r").exists()


def test_a_store_that_cannot_be_finished_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_ext.merging import _basis_store

    folders = adapters(tmp_path, 3)
    store_adapters(folders[:2], tmp_path / "s", basis_size=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_basis_store, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        add_adapter(tmp_path / "s", folders[2])
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1", "a2", "s"]


# Commands -----------------------------------------------------------------------------------------


def test_the_commands_store_and_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = adapters(tmp_path, 3)
    store = str(tmp_path / "s")
    assert main(["store", store, f"first={folders[0]}", str(folders[1]), "--basis-size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "a1" in shown
    assert main(["store", store, str(folders[2]), "--add"]) == 0
    assert read_store(store).names == ("first", "a1", "a2")
    assert main(["restore", store, "first", str(tmp_path / "r")]) == 0
    assert sorted(tensors_of(tmp_path / "r")) == sorted(tensors_of(folders[0]))
    assert main(["restore", store, "nobody", str(tmp_path / "q")]) == 2
    assert "name must be one of" in capsys.readouterr().err


# The merge method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [0, 1, 3])
def test_a_model_is_rebuilt_from_the_leading_directions(model: int, tmp_path: Path) -> None:
    folders = random_models(tmp_path, 5, dtype=torch.float32, change=1.0)
    base, *others = [tensors_of(folder) for folder in folders]
    found = merged(tmp_path, "rmm", folders[1:], folders[0], basis_size=2, model=model)
    for name, value in found.items():
        x = torch.stack([(other[name].double() - base[name]).reshape(-1) for other in others], dim=1)
        wanted = reference.rebuild(x, 2) if x.numel() else x
        wanted = wanted[:, model - 1] if model else wanted.mean(dim=1)
        torch.testing.assert_close(value.double(), base[name] + wanted.view(value.shape), rtol=0, atol=1e-5)
    at_full = merged(tmp_path, "rmm", folders[1:], folders[0], basis_size=4, model=2)
    for name, value in at_full.items():
        torch.testing.assert_close(value, others[1][name], rtol=0, atol=1e-5)


def test_a_basis_larger_than_the_number_of_models_is_refused(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 2)
    with pytest.raises(ValueError, match="basis_size must be at most 1, the number of models"):
        merged(tmp_path, "rmm", folders[1:], folders[0])
    with pytest.raises(ValueError, match="model must be at most 1"):
        merged(tmp_path, "rmm", folders[1:], folders[0], basis_size=1, model=2)
