"""CheckFree: weights, which layers are taken, what stays untouched, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ext.cli import main
from hf_ext.core.state import save_state
from hf_ext.merging import gradient_norms, recover_checkpoint, recover_layers, recovery_weights
from tests.conftest import ModelFactory
from tests.merging.models import equal, save_model, save_shards, tensors_of
from tests.reference import checkfree as reference


def test_the_weights_by_hand() -> None:
    assert recovery_weights(1.0, 1.0) == (0.5, 0.5)
    assert recovery_weights(2.0, 1.0) == pytest.approx((0.666656, 0.333344), abs=1e-6)
    assert recovery_weights(2.0, 1.0, norm_power=2.0, eps=1e-12) == pytest.approx((0.8, 0.2))
    assert recovery_weights(0.0, 0.0) == (0.5, 0.5)
    assert recovery_weights(5.0, 1.0, norm_power=0.0) == (0.5, 0.5)
    for arguments, name in (((-1.0, 1.0), "left"), ((1.0, float("nan")), "right")):
        with pytest.raises(ValueError, match=name):
            recovery_weights(*arguments)
    with pytest.raises(ValueError, match="eps must be above 0"):
        recovery_weights(1.0, 1.0, eps=0.0)


def tensors(layers: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {"embed.weight": torch.randn(9, 4, generator=draw), "norm.weight": torch.randn(4, generator=draw)}
    for layer in range(layers):
        found[f"model.layers.{layer}.up.weight"] = torch.randn(6, 4, generator=draw)
        found[f"model.layers.{layer}.experts.0.bias"] = torch.randn(3, generator=draw)
    return {name: value.to(dtype) for name, value in found.items()} | {"steps": torch.tensor([3])}


def lost(values: dict[str, Tensor], *layers: int) -> dict[str, Tensor]:
    """Return the model with NaN in some layers."""
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return {n: torch.full_like(v, torch.nan) if n.startswith(prefixes) else v for n, v in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_lost_stage_is_the_weighted_mean_of_its_neighbours(
    dtype: torch.dtype, power: float, tmp_path: Path
) -> None:
    values = tensors(12, dtype=dtype)
    save_model(tmp_path / "m", lost(values, 3, 4, 5))
    norms = {layer: 0.1 * (layer + 1) for layer in range(12)}
    found = recover_checkpoint(
        tmp_path / "m", tmp_path / "out", [3, 4, 5], norms=norms, norm_power=power, eps=1e-3
    )
    assert {layer: list(parts) for layer, parts in found.layers.items()} == {3: [0, 6], 4: [1, 7], 5: [2, 8]}
    left = sum(norms[j] ** 2 for j in (0, 1, 2)) ** 0.5
    right = sum(norms[j] ** 2 for j in (6, 7, 8)) ** 0.5
    out = tensors_of(tmp_path / "out")
    for layer in (3, 4, 5):
        for rest in ("up.weight", "experts.0.bias"):
            a, b = (values[f"model.layers.{layer + step}.{rest}"] for step in (-3, 3))
            expected = reference.mean(
                a.double().flatten().tolist(), b.double().flatten().tolist(), (left, right), power, 1e-3
            )
            made = out[f"model.layers.{layer}.{rest}"]
            assert made.dtype == dtype
            tolerance = 1e-6 if dtype == torch.float32 else 8e-3
            torch.testing.assert_close(
                made.double().flatten(), torch.tensor(expected).double(), rtol=tolerance, atol=1e-6
            )
    others = [name for name in values if name not in found.tensors]
    assert len(found.tensors) == 6
    assert equal({name: out[name] for name in others}, {name: values[name] for name in others})
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert report["layers"]["4"] == {str(k): v for k, v in found.layers[4].items()}
    assert (tmp_path / "out" / "config.json").exists()


def test_equal_neighbours_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = tensors(3)
    for rest in ("up.weight", "experts.0.bias"):
        values[f"model.layers.2.{rest}"] = values[f"model.layers.0.{rest}"].clone()
    save_model(tmp_path / "m", lost(values, 1))
    recover_checkpoint(tmp_path / "m", tmp_path / "out", [1], norms={0: 0.3, 2: 1.7})
    out = tensors_of(tmp_path / "out")
    for rest in ("up.weight", "experts.0.bias"):
        assert torch.equal(out[f"model.layers.1.{rest}"], values[f"model.layers.0.{rest}"])


def test_the_first_and_the_last_stage_are_copies(tmp_path: Path) -> None:
    values = tensors(4)
    save_model(tmp_path / "m", lost(values, 0, 3))
    found = recover_checkpoint(tmp_path / "m", tmp_path / "out", [0, 3], stage_size=1)
    assert found.layers == {0: {1: 1.0}, 3: {2: 1.0}}
    out = tensors_of(tmp_path / "out")
    assert torch.equal(out["model.layers.0.up.weight"], values["model.layers.1.up.weight"])
    assert torch.equal(out["model.layers.3.up.weight"], values["model.layers.2.up.weight"])


def test_two_stages_beside_each_other_take_the_nearest_that_are_left(tmp_path: Path) -> None:
    save_model(tmp_path / "m", lost(tensors(8), 2, 3, 4, 5))
    with pytest.warns(UserWarning, match="layer 2 is made of layer 6, more than a stage away"):
        found = recover_checkpoint(tmp_path / "m", tmp_path / "out", [2, 3, 4, 5], stage_size=2)
    assert {j: list(parts) for j, parts in found.layers.items()} == {
        2: [0, 6],
        3: [1, 7],
        4: [0, 6],
        5: [1, 7],
    }
    with pytest.raises(ValueError, match="no stage is left beside layer"):
        recover_checkpoint(tmp_path / "m", tmp_path / "out2", range(8), stage_size=1)


def test_shards_stay_shards(tmp_path: Path) -> None:
    values = lost(tensors(3), 1)
    names = sorted(values)
    parts = [names[:3], names[3:]]
    save_shards(tmp_path / "m", [{name: values[name] for name in part} for part in parts])
    recover_checkpoint(tmp_path / "m", tmp_path / "out", [1])
    save_model(tmp_path / "single", values)
    recover_checkpoint(tmp_path / "single", tmp_path / "out1", [1])
    sharded, single = (dict(sorted(tensors_of(tmp_path / name).items())) for name in ("out", "out1"))
    assert equal(sharded, single)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "m" / index).read_bytes()


def test_what_cannot_be_rebuilt_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    values = tensors(3)
    save_model(tmp_path / "m", values)
    refused: list[tuple[list[int], dict[str, Any], str]] = [
        ([7], {}, r"layers must be layers of model\.layers, 0 to 2"),
        ([], {}, "layers must be at least one number"),
        ([1], {"stage_size": 0}, "stage_size must be at least 1"),
        ([1], {"norms": {0: 1.0}}, r"norms must be given for layers \[2\] too"),
        ([1], {"norms": {0: 1.0, 2: 1.0}, "norm_power": -1.0}, "norm_power"),
        ([1], {"prefix": "layers"}, "prefix must be one of model.layers"),
    ]
    for layers, options, text in refused:
        with pytest.raises(ValueError, match=text):
            recover_checkpoint(tmp_path / "m", tmp_path / "out", layers, **options)
    other = {**values, "model.layers.2.up.weight": torch.zeros(7, 4)}
    save_model(tmp_path / "shape", other)
    with pytest.raises(ValueError, match=r"model\.layers\.1 cannot be made of model\.layers\.2: up\.weight"):
        recover_checkpoint(tmp_path / "shape", tmp_path / "out", [1])
    save_model(tmp_path / "nan", lost(values, 1, 2))
    with pytest.raises(ValueError, match=r"NaN or infinite values in model\.layers\.0"):
        recover_checkpoint(tmp_path / "nan", tmp_path / "out", [1])
    save_model(tmp_path / "plain", {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="prefix must be given: lists of layers are none"):
        recover_checkpoint(tmp_path / "plain", tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="out must be a folder that does not exist"):
        recover_checkpoint(tmp_path / "m", tmp_path / "plain", [1])


def test_an_adapter_is_no_model_to_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "a", tensors(3))
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for lost_ones in (["--layers", "1"], ["--stage", "2", "--stages", "3"]):
        assert main(["recover", str(tmp_path / "a"), str(tmp_path / "out"), *lost_ones]) == 2
        assert "checkpoint must be a whole model's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def save_norms(folder: Path, norms: list[float | None]) -> None:
    """Write what StageRecoveryCallback leaves in a checkpoint."""
    save_state(folder, "hf_ext_stage_recovery", {"step": 7, "state": {"norms": norms}})


def test_the_command_takes_recorded_norms_and_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tensors(12)
    model, twin = str(tmp_path / "m"), str(tmp_path / "twin")
    save_model(tmp_path / "m", lost(values, 3, 4, 5))
    assert main(["recover", model, str(tmp_path / "equal"), "--layers", "3-5"]) == 0
    assert "equal weights" in capsys.readouterr().out
    norms = [0.1 * (layer + 1) for layer in range(12)]
    save_norms(tmp_path / "m", [*norms])
    assert main(["recover", model, str(tmp_path / "out"), "--stage", "2", "--stages", "4"]) == 0
    said = capsys.readouterr().out
    assert f"gradient norms of {model}" in said
    recover_checkpoint(model, twin, [3, 4, 5], norms=dict(enumerate(norms)))
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "twin"))
    assert not equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "equal"))
    weight = json.loads((tmp_path / "out" / "recovery.json").read_text())["layers"]["4"]["1"]
    assert f"layer 4: {weight:.6g} x layer 1 + {1 - weight:.6g} x layer 7" in said
    save_model(tmp_path / "bare", lost(values, 3, 4, 5))
    again = [
        "recover",
        str(tmp_path / "bare"),
        str(tmp_path / "again"),
        "--layers",
        "3,4,5",
        "--norms",
        model,
    ]
    assert main(again) == 0
    assert equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "twin"))
    assert main(["recover", model, str(tmp_path / "flat"), "--layers", "3-5", "--norms", "none"]) == 0
    assert equal(tensors_of(tmp_path / "flat"), tensors_of(tmp_path / "equal"))


@pytest.mark.parametrize(("stage", "copied"), [(1, {0: 3, 2: 5}), (2, {3: 0}), (4, {9: 6}), (3, {6: 9})])
def test_outer_stages_that_were_swapped_in_training_are_copies_of_their_partners(
    stage: int, copied: dict[int, int], tmp_path: Path
) -> None:
    values = tensors(12)
    first = 3 * (stage - 1)
    save_model(tmp_path / "m", lost(values, first, first + 1, first + 2))
    given = ["recover", str(tmp_path / "m"), str(tmp_path / "out"), "--stage", str(stage), "--stages", "4"]
    assert main([*given, "--swapped"]) == 0
    found = tensors_of(tmp_path / "out")
    for layer, partner in copied.items():
        for name in (name for name in values if f"layers.{layer}." in name):
            assert torch.equal(found[name], values[name.replace(f"layers.{layer}.", f"layers.{partner}.")])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--stage", "2", "--stages", "3", "--swapped", "--norms", "none"],
            "stages must be at least 4 to swap",
        ),
        ([], "--layers or --stage must be given"),
        (["--layers", "1", "--stage", "2", "--stages", "3"], "--layers or --stage must be given"),
        (["--stage", "2"], "--stages must be given"),
        (["--stage", "2", "--stages", "2"], "stages must be a divisor of 3"),
        (["--stage", "4", "--stages", "3"], "stage must be 1 to 3 (stages are numbered from 1), got [4]"),
        (["--layers", "1-"], "--layers must be numbers and ranges such as 3-5,8, got '1-'"),
        (["--layers", "1", "--norms", "elsewhere"], "recorded by StageRecoveryCallback"),
        (["--layers", "1"], "norms must be a list of numbers"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "m", tensors(3))
    save_norms(tmp_path / "m", [1.0, None, 2.0])
    assert main(["recover", str(tmp_path / "m"), str(tmp_path / "out"), *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# In memory ----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A residual network of equal blocks."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(count))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def test_only_the_lost_layers_and_their_state_change() -> None:
    model: Any = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 5)).square().mean().backward()
    norms = gradient_norms(model)
    for layer, norm in norms.items():
        grads = [p.grad.flatten() for p in model.layers[layer].parameters()]
        assert norm == pytest.approx(float(torch.cat(grads).norm()))
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.layers[1].weight.fill_(float("nan"))
    found = recover_layers(model, [1], norms=norms, optimizer=optimizer)
    assert set(found.tensors) == {"layers.1.weight", "layers.1.bias"}
    a, b = recovery_weights(norms[0], norms[2])
    torch.testing.assert_close(
        model.layers[1].weight.detach(), a * before["layers.0.weight"] + b * before["layers.2.weight"]
    )
    for name, parameter in model.named_parameters():
        lost_one = name.startswith("layers.1.")
        assert lost_one or torch.equal(parameter, before[name])
        assert (parameter in optimizer.state) is not lost_one
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    assert float(optimizer.state[model.layers[1].weight]["step"]) == 1.0
    assert float(optimizer.state[model.layers[0].weight]["step"]) == 2.0


def test_a_model_of_transformers_without_gradients(tiny_llama: ModelFactory) -> None:
    model = tiny_llama(num_hidden_layers=3)
    assert gradient_norms(model) == {0: 0.0, 1: 0.0, 2: 0.0}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recover_layers(model, [1])
    for name, value in model.named_parameters():
        if ".layers.1." in name:
            a, b = (before[name.replace(".1.", f".{other}.")] for other in (0, 2))
            torch.testing.assert_close(value.detach(), (a + b) / 2)
        else:
            assert torch.equal(value, before[name])


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Parameter, "full_tensor", lambda self: self, raising=False)
    for call in (lambda: recover_layers(Blocks(), [1]), lambda: gradient_norms(Blocks())):
        with pytest.raises(ValueError, match="is sharded: a process that is lost takes a part"):
            call()
