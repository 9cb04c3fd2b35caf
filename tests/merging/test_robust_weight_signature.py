"""Exact properties of robust weight signatures: what is extracted, stored, patched in and taken off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_ext.cli import main
from hf_ext.merging import (
    SignaturePatch,
    apply_signatures,
    extract_signature,
    merge,
    read_signature,
    remove_signatures,
    signature_to_lora,
)
from hf_ext.merging._checkpoint import Checkpoint
from hf_ext.merging._deltas import TaskVector, orthogonal_part
from hf_ext.merging._quantized import BITS, MODES, encoded, quantize
from hf_ext.merging._signatures import forward_order, shallow
from tests.conftest import ModelFactory
from tests.merging.models import equal, merged, random_models, same_bits, save_model, save_shards, tensors_of
from tests.reference import robust_weight_signature as reference

LAYERS = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def extracted(
    tmp_path: Path, folders: list[Path], name: str = "sig", robust: int = 2, **options: Any
) -> Path:
    extract_signature(folders[0], folders[1], folders[robust], tmp_path / name, **options)
    return tmp_path / name


# Changes ------------------------------------------------------------------------------------------


def test_a_hand_computed_signature() -> None:
    a, v = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -2.0])
    assert orthogonal_part(v, a).tolist() == [0.0, 1.0, -2.0]
    assert torch.equal(orthogonal_part(v, torch.zeros(3)), v)


def test_what_clean_training_explains_leaves_nothing() -> None:
    a = random(40, 30)
    for scale in (1.0, -0.3, 7.0):
        assert float(orthogonal_part(scale * a, a).norm()) <= 1e-6 * float((scale * a).norm())


def test_the_signature_is_orthogonal_to_the_clean_change() -> None:
    a, v = random(300, 200), random(300, 200, seed=1) + 3.0 * random(300, 200)
    s = orthogonal_part(v, a)
    assert abs(float((s.double() * a.double()).sum())) < 1e-6 * float(s.norm()) * float(a.norm())
    torch.testing.assert_close(s.double(), reference.signature(torch.zeros_like(a), a, v), rtol=0, atol=1e-6)


def test_task_vectors_of_files(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    tensors = [{n: v.float() for n, v in tensors_of(f).items()} for f in folders]
    start, *tuned = [Checkpoint(folder) for folder in folders]
    one, two = (TaskVector(model, start) for model in tuned)
    assert one.names() == sorted(tensors[0])
    assert torch.equal(one[LAYERS[0]], tensors[1][LAYERS[0]] - tensors[0][LAYERS[0]])
    flat = [
        torch.cat([(t[n] - tensors[0][n]).reshape(-1).double() for n in one.names()]) for t in tensors[1:]
    ]
    assert one.norm() == pytest.approx(float(flat[0].norm()), rel=1e-9)
    assert one.dot(two) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-9)
    found = one.truncated(LAYERS[0], 2)
    wanted = torch.linalg.svdvals(one[LAYERS[0]])[:2]
    torch.testing.assert_close(found.s, wanted, rtol=1e-3, atol=0)
    rounded = one.quantized(LAYERS[0], 8).values()
    assert float((rounded - one[LAYERS[0]]).abs().max()) <= float(one[LAYERS[0]].abs().max()) / 127
    other = Checkpoint(save_model(tmp_path / "other", {"w": torch.ones(2)}))
    with pytest.raises(ValueError, match="of the same names and shapes"):
        TaskVector(other, start).names()


# Codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "expected"), [(4, [-1.0, -1 / 3, 1 / 3, 1.0]), (3, [-1.0, 0.0, 0.0, 1.0])]
)
def test_hand_computed_levels(levels: int, expected: list[float]) -> None:
    values = [-1.0, -0.2, 0.1, 1.0]
    assert reference.uniform(values, levels) == pytest.approx(expected)
    codes, low, high = encoded(torch.tensor(values, dtype=torch.float64), levels, "minmax")
    found = codes.double() / (levels - 1) * (high - low) + low
    assert found.tolist() == pytest.approx(expected)
    if levels == 4:
        assert quantize(torch.tensor(values), 2, "minmax").values().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
def test_codes_of_what_was_decoded_are_the_same(bits: int, mode: str) -> None:
    x = random(7, 31) * torch.exp(random(7, 31, seed=1))
    x[0, :5] = 0.0
    first = quantize(x, bits, mode)
    again = quantize(first.values(), bits, mode)
    assert torch.equal(first.codes, again.codes)
    assert first.values().shape == x.shape
    if mode != "minmax":
        assert torch.equal(first.values()[0, :5], torch.zeros(5)), "zero stays zero"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_the_error_is_at_most_half_a_step(bits: int) -> None:
    x = random(5000)
    symmetric = quantize(x, bits).values()
    assert float((symmetric - x).abs().max()) <= 0.5001 * float(x.abs().max()) / (2 ** (bits - 1) - 1)
    spread = quantize(x, bits, "minmax").values()
    torch.testing.assert_close(
        spread.tolist(), reference.uniform(x.double().tolist(), 2**bits), rtol=0, atol=1e-6
    )
    logs = quantize(x, bits, "log").values()
    assert bool((logs.sign() == x.sign()).all())


@pytest.mark.parametrize("mode", MODES)
def test_constant_and_empty_tensors(mode: str) -> None:
    for x in (torch.zeros(9), torch.full((9,), 2.5), torch.full((9,), -1.0), torch.zeros(0, 3)):
        torch.testing.assert_close(quantize(x, 4, mode).values(), x)


def test_sizes_of_packed_codes() -> None:
    kernel = torch.empty(512, 512, 3, 3).normal_()
    assert quantize(kernel, 8).nbytes <= kernel.numel() + 64
    for bits in range(2, 9):
        assert quantize(torch.ones(1001), bits).nbytes == math.ceil(1001 * bits / 8) + 8


# Layers -------------------------------------------------------------------------------------------


def test_the_order_of_layers_follows_their_numbers() -> None:
    names = [
        "lm_head.weight",
        "model.layers.10.w",
        "model.layers.9.w",
        "model.norm.weight",
        "model.layers.2.w",
    ]
    assert forward_order(names) == [
        "model.layers.2.w", "model.layers.9.w", "model.layers.10.w", "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip


def test_shallow_layers_are_weights_with_their_biases() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), "bn1.weight": (8,), "bn1.running_mean": (8,),
        "layer1.0.conv1.weight": (8, 8, 3, 3), "layer1.0.downsample.0.weight": (8, 8, 1, 1),
        "fc.weight": (10, 8), "embed_tokens.weight": (9, 8), "input_layernorm.weight": (8,),
    }  # fmt: skip
    assert shallow(shapes, 1, None) == ["conv1.bias", "conv1.weight"]
    assert shallow(shapes, 2, None)[-1] == "layer1.0.conv1.weight"
    assert shallow(shapes, 99, None)[-1] == "fc.weight"
    assert shallow(shapes, 1, ["fc.weight", *shapes]) == ["fc.weight"]


# Signatures in files ------------------------------------------------------------------------------


def test_a_signature_holds_what_the_reference_computes(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3, dtype=torch.float32)
    found = read_signature(extracted(tmp_path, folders, keep_num=1, bits=32, label="noise"))
    assert found.label == "noise"
    assert list(found.tensors) == [LAYERS[0]]
    start, clean, robust = (tensors_of(folder)[LAYERS[0]] for folder in folders)
    wanted = reference.signature(start, clean, robust)
    torch.testing.assert_close(found.tensors[LAYERS[0]].values().double(), wanted, rtol=0, atol=1e-6)
    small = read_signature(extracted(tmp_path, folders, "small", keep_num=1, bits=4))
    assert small.nbytes <= start.numel() / 2 + 64
    error = small.info["tensors"][LAYERS[0]]["quantization_error"]
    wrong = (small.tensors[LAYERS[0]].values().double() - wanted).norm() / wanted.norm()
    assert error == pytest.approx(float(wrong), rel=1e-4)
    assert str(tmp_path) not in (tmp_path / "small" / "rws.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 8, 32])
def test_taking_a_signature_off_restores_every_byte(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3, dtype=dtype)
    signature = extracted(tmp_path, folders, bits=bits, keep_num=99, keep_norms=True)
    before = files_of(folders[1])
    for mode in ("keep", "mean_of_robust"):
        patched = apply_signatures(folders[1], {signature: 0.7}, tmp_path / mode, norm_mode=mode)
        assert not same_bits(tensors_of(patched)[LAYERS[0]], tensors_of(folders[1])[LAYERS[0]])
        remove_signatures(patched, tmp_path / f"{mode}-off")
        assert files_of(tmp_path / f"{mode}-off") == before
    assert files_of(folders[1]) == before, "the model itself is not touched"


def test_a_hundred_random_tensors_come_back(tmp_path: Path) -> None:
    for seed in range(10):
        names = [f"l{i}.weight" for i in range(10)]
        models: list[Path] = []
        for k in range(3):
            values = (random(10, 100, 10, seed=seed) + 0.3 * k * random(10, 100, 10, seed=50 + k)).bfloat16()
            models.append(
                save_model(
                    tmp_path / f"{seed}-{k}", {n: v.clone() for n, v in zip(names, values, strict=True)}
                )
            )
        signature = extracted(tmp_path, models, f"s{seed}", keep_num=10)
        apply_signatures(models[1], [signature], tmp_path / f"p{seed}")
        remove_signatures(tmp_path / f"p{seed}", tmp_path / f"p{seed}", overwrite=True)
        assert files_of(tmp_path / f"p{seed}") == files_of(models[1])


def test_what_is_patched_is_the_sum_rounded_once(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4)
    one = extracted(tmp_path, folders, "one", label="one")
    two = extracted(tmp_path, folders, "two", robust=3, label="two")
    patched = tensors_of(apply_signatures(folders[1], {one: 0.5, two: -0.25}, tmp_path / "p"))
    own, signatures = tensors_of(folders[1]), [read_signature(one), read_signature(two)]
    for name, value in patched.items():
        wanted = own[name].float()
        for alpha, signature in zip((0.5, -0.25), signatures, strict=True):
            if name in signature.tensors:
                wanted = wanted + alpha * signature.tensors[name].values()
        assert same_bits(value, wanted.bfloat16())
    assert sorted(signatures[0].tensors) == sorted([*LAYERS, "lm_head.weight"])
    even = tensors_of(apply_signatures(folders[1], [one, two], tmp_path / "even"))
    halves = tensors_of(apply_signatures(folders[1], {one: 0.5, two: 0.5}, tmp_path / "halves"))
    assert equal(even, halves)


def test_signatures_commute_and_are_scaled_anew(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4)
    one = extracted(tmp_path, folders, "one", label="one")
    two = extracted(tmp_path, folders, "two", robust=3, label="two")
    a = apply_signatures(
        apply_signatures(folders[1], {one: 1.0}, tmp_path / "a"), {two: 0.5}, tmp_path / "ab"
    )
    b = apply_signatures(
        apply_signatures(folders[1], {two: 0.5}, tmp_path / "b"), {one: 1.0}, tmp_path / "ba"
    )
    assert files_of(a) == files_of(b)
    alone = remove_signatures(a, tmp_path / "alone", ["two"])
    assert files_of(alone) == files_of(tmp_path / "a")
    scaled = apply_signatures(a, {two: -0.5}, tmp_path / "scaled")
    back = apply_signatures(scaled, {two: 0.5}, scaled, overwrite=True)
    assert files_of(back) == files_of(a)
    nothing = apply_signatures(folders[1], {one: 0.0}, tmp_path / "zero")
    assert equal(tensors_of(nothing), tensors_of(folders[1]))


def test_norms_of_the_robust_models_are_averaged(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4, dtype=torch.float32)
    one = extracted(tmp_path, folders, "one", label="one", keep_norms=True)
    two = extracted(tmp_path, folders, "two", robust=3, label="two", keep_norms=True)
    bare = extracted(tmp_path, folders, "bare", label="bare")
    patched = tensors_of(apply_signatures(folders[1], [one, two], tmp_path / "p", norm_mode="mean_of_robust"))
    name = "model.layers.0.norm.weight"
    mean = (tensors_of(folders[2])[name] + tensors_of(folders[3])[name]) / 2
    torch.testing.assert_close(patched[name], mean)
    with pytest.raises(
        ValueError, match="norm_mode must be 'keep', where a signature has not kept the norms"
    ):
        apply_signatures(folders[1], [bare], tmp_path / "q", norm_mode="mean_of_robust")


def test_a_model_of_several_files_and_its_side_files(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    signature = extracted(tmp_path, folders)
    tensors = tensors_of(folders[1])
    names = sorted(tensors)
    model = save_shards(
        tmp_path / "shards", [{n: tensors[n] for n in names[:4]}, {n: tensors[n] for n in names[4:]}]
    )
    (model / "sub").mkdir()
    (model / "sub" / "vocab.txt").write_text("a\nb\n")
    patched = apply_signatures(model, {signature: 1.0}, tmp_path / "p")
    single = apply_signatures(folders[1], {signature: 1.0}, tmp_path / "q")
    assert equal(dict(sorted(tensors_of(patched).items())), dict(sorted(tensors_of(single).items())))
    assert (patched / "sub" / "vocab.txt").read_text() == "a\nb\n"
    assert files_of(remove_signatures(patched, tmp_path / "off")) == files_of(model)


def test_the_manifest_of_a_merged_model_is_kept_true(tmp_path: Path) -> None:
    import hashlib

    folders = random_models(tmp_path, 4)
    signature = extracted(tmp_path, folders, label="noise")
    merge(
        {"merge_method": "linear", "models": [str(f) for f in folders[1:3]]}, tmp_path / "m", progress=False
    )
    patched = apply_signatures(tmp_path / "m", {signature: 0.5}, tmp_path / "p")
    manifest = json.loads((patched / "merge_manifest.json").read_text())
    assert manifest["signatures"] == {"noise": 0.5}
    for name, digest in manifest["output"].items():
        assert hashlib.sha256((patched / name).read_bytes()).hexdigest() == digest
    assert files_of(remove_signatures(patched, tmp_path / "off")) == files_of(tmp_path / "m")


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    signature = extracted(tmp_path, folders)
    small = save_model(tmp_path / "small", {LAYERS[0]: torch.ones(3, 3)})
    with pytest.raises(
        ValueError, match=r"does not fit the model: .*up_proj\.weight \[300, 130\].*\[3, 3\] F32"
    ):
        apply_signatures(small, [signature], tmp_path / "p")
    with pytest.raises(ValueError, match="alpha must be between -2 and 2, got 3"):
        apply_signatures(folders[1], {signature: 3.0}, tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="is no signature"):
        apply_signatures(folders[1], [folders[2]], tmp_path / "p")
    with pytest.raises(ValueError, match="model must be a patched one"):
        remove_signatures(folders[1], tmp_path / "p")
    with pytest.raises(ValueError, match="out must be another folder"):
        apply_signatures(folders[1], [signature], folders[1])
    with pytest.raises(ValueError, match="out must be an earlier result"):
        apply_signatures(folders[1], [signature], folders[2], overwrite=True)
    bad: list[dict[str, Any]] = [{"keep_num": 0}, {"bits": 9}, {"quant_mode": "x"}, {"tensors": ["none"]}]
    for options in bad:
        (text,) = options
        with pytest.raises(ValueError, match=rf"\b{text} must be"):
            extracted(tmp_path, folders, "bad", **options)
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "bad").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_damaged_originals_are_not_restored(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3)
    patched = apply_signatures(folders[1], [extracted(tmp_path, folders)], tmp_path / "p")
    file = patched / "rws" / "original.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"original\.safetensors must be as it was written"):
        remove_signatures(patched, tmp_path / "off")
    assert not (tmp_path / "off").exists()


# In memory, and as a LoRA -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_patch_in_memory_scales_and_comes_off(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)
    models = []
    for k in range(3):
        tensors = {n: v + 0.1 * k * random(*v.shape, seed=k).to(dtype) for n, v in net.state_dict().items()}
        models.append(save_model(tmp_path / f"m{k}", tensors))
    signature = extracted(tmp_path, models, keep_num=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    patch = SignaturePatch(net, [signature])
    whole = net[0].weight.detach().clone()
    assert not torch.equal(whole, before["0.weight"])
    assert torch.equal(net[2].weight, before["2.weight"]), "deeper layers are left alone"
    patch.scale(0.5)
    half = net[0].weight.detach().clone()
    patch.scale(1.0)
    assert same_bits(net[0].weight.detach(), whole), "scaled from the originals, not from what is there"
    torch.testing.assert_close(
        half.float(), (before["0.weight"].float() + whole.float()) / 2, rtol=0, atol=2e-2
    )
    patch.remove()
    assert all(same_bits(net.state_dict()[name], before[name]) for name in before)
    with pytest.raises(ValueError, match=r"0\.(weight|bias) must be"):
        SignaturePatch(nn.Sequential(nn.Linear(3, 3)), [signature])


def test_a_signature_as_a_lora_is_switched_on_and_off(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    from peft import PeftModel

    folders = []
    for seed in range(3):
        folders.append(tmp_path / f"m{seed}")
        tiny_llama(seed=seed).save_pretrained(folders[-1])
    signature = extracted(tmp_path, folders, keep_num=3, bits=8)
    held = read_signature(signature)
    full = max(min(value.shape) for value in held.tensors.values())
    assert signature_to_lora(signature, tmp_path / "lora", rank=full) < 1e-6
    assert 0.05 < signature_to_lora(signature, tmp_path / "thin", rank=2, alpha=0.5) < 1.0
    patched = apply_signatures(folders[1], {signature: 1.0}, tmp_path / "p")
    load = type(tiny_llama(seed=0)).from_pretrained
    ids = torch.tensor([[1, 5, 9]])
    model = PeftModel.from_pretrained(load(folders[1]), tmp_path / "lora").eval()
    torch.testing.assert_close(model(ids).logits, load(patched).eval()(ids).logits, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, load(folders[1]).eval()(ids).logits)
    biased = save_model(tmp_path / "biased", {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3)})
    extract_signature(biased, biased, biased, tmp_path / "with-bias")
    with pytest.raises(ValueError, match=r"weight matrices alone.*a\.bias|a\.bias.*"):
        signature_to_lora(tmp_path / "with-bias", tmp_path / "x", rank=1)


# Commands and the merge method --------------------------------------------------------------------


def test_the_commands_extract_apply_and_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = random_models(tmp_path, 3)
    names = [str(folder) for folder in folders]
    signature, patched, off = (str(tmp_path / name) for name in ("s", "p", "off"))
    assert main(["signature", "extract", *names, signature, "--label", "noise", "--keep-num", "2"]) == 0
    assert "noise, 2 tensors" in capsys.readouterr().out
    assert main(["signature", "apply", names[1], patched, signature, "--alpha", "0.5"]) == 0
    assert main(["signature", "remove", patched, off, "--label", "noise"]) == 0
    assert files_of(Path(off)) == files_of(folders[1])
    assert main(["signature", "remove", patched, off, "--label", "fog"]) == 2
    assert "label must be one of 'noise'" in capsys.readouterr().err


def test_the_merge_method_adds_the_mean_of_the_signatures(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 4, dtype=torch.float32)
    start, clean, *robust = [tensors_of(folder) for folder in folders]
    parents = [{}, {"alpha": 1.0}, {"alpha": -0.5}]
    found = merged(tmp_path, "robust_weight_signature", folders[1:], folders[0], parents=parents, keep_num=1)
    for name, value in found.items():
        wanted = clean[name].double()
        if name == LAYERS[0]:
            for alpha, one in zip((1.0, -0.5), robust, strict=True):
                wanted = wanted + alpha / 2 * reference.signature(start[name], clean[name], one[name])
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="models must be the clean model and at least one"):
        merged(tmp_path, "robust_weight_signature", folders[1:2], folders[0])


def test_the_merge_method_equals_an_unquantized_patch(tmp_path: Path) -> None:
    folders = random_models(tmp_path, 3, dtype=torch.float32)
    signature = extracted(tmp_path, folders, bits=32, keep_num=3)
    patched = load_file(apply_signatures(folders[1], {signature: 1.0}, tmp_path / "p") / "model.safetensors")
    found = merged(tmp_path, "robust_weight_signature", folders[1:], folders[0], keep_num=3)
    for name, value in found.items():
        torch.testing.assert_close(value, patched[name], rtol=0, atol=2e-6)
