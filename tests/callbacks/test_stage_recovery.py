"""CheckFree in training: what is rebuilt of what, its rate and counters, resuming, swaps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_ext.adapters import BoneConfig, PissaConfig, SorsaConfig
from hf_ext.callbacks import StageRecoveryCallback
from hf_ext.callbacks._base import Run
from hf_ext.core.state import load_state
from hf_ext.merging import recorded_gradient_norms
from tests.callbacks.runs import MIDDLE, STEPS, StopAt, build, equal, logged, parameters
from tests.conftest import build_tiny_llama
from tests.reference import checkfree as reference


class Blocks(nn.Module):
    """A residual network of equal blocks."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(count))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def running(
    model: nn.Module, optimizer: Any, norms: list[float] | None = None, **settings: Any
) -> StageRecoveryCallback:
    """Return the callback in the middle of a run, which has recorded these norms."""
    callback = StageRecoveryCallback(**settings)
    args: Any = SimpleNamespace(distributed_state=None)
    callback._norms = [torch.tensor(norm).double() for norm in norms or ()]
    callback.begin(Run(args, TrainerState(max_steps=10), TrainerControl(), model, optimizer, None))
    return callback


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    optimizer.zero_grad()
    model(torch.randn(8, 5, generator=generator)).square().mean().backward()
    optimizer.step()


def lose(model: Any, *layers: int) -> None:
    with torch.no_grad():
        for layer in layers:
            for parameter in model.layers[layer].parameters():
                parameter.fill_(torch.nan)


# What is made of what -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "settings", "weights"),
    [
        ((1.0, 1.0), {}, (0.5, 0.5)),
        ((2.0, 1.0), {}, (0.666656, 0.333344)),
        ((2.0, 1.0), {"norm_power": 2, "eps": 1e-12}, (0.8, 0.2)),
        ((2.0, 1.0), {"norm_power": 0}, (0.5, 0.5)),
        ((0.0, 0.0), {}, (0.5, 0.5)),
        (None, {}, (0.5, 0.5)),
    ],
)
def test_weights_by_hand(norms: Any, settings: dict[str, Any], weights: tuple[float, float]) -> None:
    model: Any = Blocks(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lose(model, 1)
    recorded = None if norms is None else [norms[0], 9.0, norms[1]]
    found = running(model, torch.optim.SGD(model.parameters(), lr=0.1), recorded, **settings).recover(2)
    assert list(found.layers) == [1]
    assert tuple(found.layers[1].values()) == pytest.approx(weights, abs=1e-6)
    a, b = (before[f"layers.{layer}.weight"].flatten().tolist() for layer in (0, 2))
    expected = reference.mean(a, b, weights, 1.0, 1e-12)
    assert model.layers[1].weight.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_the_second_of_four_stages_of_twelve_layers_is_layers_3_to_5() -> None:
    model: Any = Blocks(12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lose(model, 3, 4, 5)
    norms = [0.1 * (layer + 1) for layer in range(12)]
    callback = running(model, torch.optim.SGD(model.parameters(), lr=0.1), norms, stages=4)
    found = callback.recover(2)
    assert {layer: list(parts) for layer, parts in found.layers.items()} == {3: [0, 6], 4: [1, 7], 5: [2, 8]}
    left, right = (sum(norms[j] ** 2 for j in layers) ** 0.5 for layers in ((0, 1, 2), (6, 7, 8)))
    expected = (left + 1e-4) / (left + right + 2e-4)
    assert found.layers[4][1] == pytest.approx(expected, rel=1e-6)
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(found.tensors)


def test_equal_neighbors_come_back_bit_for_bit() -> None:
    model: Any = Blocks(3)
    model.layers[2].load_state_dict(model.layers[0].state_dict())
    lose(model, 1)
    running(model, torch.optim.SGD(model.parameters(), lr=0.1), [0.3, 1.0, 1.7]).recover(2)
    for rebuilt, neighbor in zip(model.layers[1].parameters(), model.layers[0].parameters(), strict=True):
        assert torch.equal(rebuilt, neighbor)


def test_several_lost_stages() -> None:
    model: Any = Blocks(6)
    callback = running(model, torch.optim.SGD(model.parameters(), lr=0.1), [1.0] * 6)
    with pytest.warns(UserWarning, match="layer 1 is made of layer 3, more than a stage away"):
        found = callback.recover(3, 2)
    assert found.layers == {1: {0: 0.5, 3: 0.5}, 2: {0: 0.5, 3: 0.5}}
    assert callback.recover(1).layers == {0: {1: 1.0}}
    assert callback.recover(6).layers == {5: {4: 1.0}}
    assert callback.scalars()["recovered"] == 4.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    refused: list[tuple[tuple[int, ...], str]] = [
        ((), "stages must be 1 to 6"),
        ((0,), r"stages must be 1 to 6 \(stages are numbered from 1\), got \[0\]"),
        ((7,), "stages must be 1 to 6"),
        (tuple(range(1, 7)), "no stage is left beside layer 0"),
    ]
    for stages, text in refused:
        with pytest.raises(ValueError, match=text):
            callback.recover(*stages)
    lose(model, 3)
    with pytest.raises(ValueError, match=r"layers\.4\.weight.*finite"):
        callback.recover(5)
    assert torch.equal(model.layers[4].weight, before["layers.4.weight"])
    callback.undo()
    with pytest.raises(RuntimeError, match="while a run is on"):
        callback.recover(1)


def test_outer_stages_are_copies_of_their_partners_where_stages_swap() -> None:
    model: Any = Blocks(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = running(model, optimizer, [1.0] * 8, stages=4, swap_prob=0.5)
    for stage, made in ((1, {0: 2, 1: 3}), (2, {2: 0, 3: 1}), (3, {4: 6, 5: 7}), (4, {6: 4, 7: 5})):
        assert callback.recover(stage).layers == {layer: {other: 1.0} for layer, other in made.items()}
    assert running(model, optimizer, [1.0] * 8, stages=4).recover(2).layers[2] == {0: 0.5, 4: 0.5}
    with pytest.warns(UserWarning, match="more than a stage away"):
        assert callback.recover(1, 2).layers == {0: {4: 1.0}, 1: {5: 1.0}, 2: {4: 1.0}, 3: {5: 1.0}}


def test_layers_of_another_shape_or_kind_are_refused() -> None:
    model: Any = Blocks(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.config = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}  # pyright: ignore
    with pytest.raises(ValueError, match=r"layers\.1 cannot.*sliding_attention and full_attention"):
        running(model, optimizer).recover(2)
    del model.config
    model.layers[2] = nn.Linear(5, 5, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1 cannot be made of layers\.2: bias"):
        running(model, optimizer).recover(2)
    for settings, text in (
        ({"stages": 2}, "stages must be a divisor of 3"),
        ({"swap_prob": 0.5}, "stages must be at least 4 to swap"),
        ({"prefix": "blocks"}, "prefix must be one of layers"),
    ):
        with pytest.raises(ValueError, match=text):
            running(model, optimizer, **settings)


def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Parameter, "full_tensor", lambda self: self, raising=False)
    model: Any = Blocks(3)
    with pytest.raises(ValueError, match=r"whole replica.*takes a part of every layer"):
        running(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (SorsaConfig(r=4, target_modules=["q_proj"]), "SorsaLinear"),
        (PissaConfig(r=4, target_modules=["q_proj"]), "PissaLinear"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(r=4, target_modules=["q_proj"]), None),
        (BoneConfig(r=4, target_modules=["q_proj"]), None),
    ],
    ids=["sorsa", "pissa", "pissa_of_peft", "lora", "bone"],
)
def test_adapters_that_belong_to_their_own_layer_are_refused(config: Any, refused: str | None) -> None:
    model: Any = get_peft_model(build_tiny_llama(num_hidden_layers=3), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if refused is None:
        assert running(model, optimizer).recover(2).tensors
        return
    with pytest.raises(ValueError, match=f"adapter must be one whose trained .* got .{refused}"):
        running(model, optimizer)


# The optimizer ------------------------------------------------------------------------------------


def test_a_rebuilt_stage_starts_afresh_and_at_a_raised_rate() -> None:
    model: Any = Blocks(4)
    optimizer = torch.optim.AdamW(
        [{"params": model.layers.parameters()}, {"params": model.head.parameters(), "lr": 0.5}], lr=0.01
    )
    callback = running(model, optimizer, lr_scale=1.5)
    step(model, optimizer)
    callback.recover(2)
    lost = list(model.layers[1].parameters())
    assert {p for p in model.parameters() if p not in optimizer.state} == set(lost)
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    seen: list[list[tuple[float, list[Tensor]]]] = []
    optimizer.register_step_pre_hook(
        lambda opt, *_: seen.append([(group["lr"], list(group["params"])) for group in opt.param_groups])
    )
    for rate in (0.01, 0.004):  # what a schedule sets
        optimizer.param_groups[0]["lr"] = rate
        step(model, optimizer)
    for rate, found in zip((0.01, 0.004), seen, strict=True):
        assert [lr for lr, _ in found] == pytest.approx([rate, 0.5, 1.5 * rate])
        assert found[2][1] == lost
        assert not {*found[0][1]} & {*lost}
    # Between steps the groups are those that the schedule and the checkpoint know.
    assert [(group, list(group["params"])) for group in optimizer.param_groups] == groups
    counts = [float(optimizer.state[model.layers[j].weight]["step"]) for j in range(4)]
    assert counts == [3.0, 2.0, 3.0, 3.0]


def test_the_raised_rate_falls_back() -> None:
    model: Any = Blocks(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = running(model, optimizer, lr_scale=1.8, lr_recover_steps=4)
    factors = [callback.lr_factor(2)]
    callback.recover(2)
    for _ in range(6):
        factors.append(callback.lr_factor(2))
        step(model, optimizer)
    assert factors == pytest.approx([1.0, 1.8, 1.6, 1.4, 1.2, 1.0, 1.0])
    callback.recover(2)
    assert callback.lr_factor(2) == 1.8
    assert callback.lr_factor(1) == 1.0


class GroupStep(torch.optim.Optimizer):
    """Adam's first moment with its bias corrected by a step counter of the group, as several libraries do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "peak": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["peak"] = torch.tensor(float(group["step"] + 1))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.sub_(group["lr"] * mean / (1.0 - 0.9 ** group["step"]))


def test_a_counter_of_the_group_starts_afresh_for_the_stage() -> None:
    model: Any = Blocks(3)
    optimizer = GroupStep(model.parameters(), lr=0.1)
    callback = running(model, optimizer, lr_scale=1.0)
    for _ in range(3):
        step(model, optimizer)
    callback.recover(2)
    before = model.layers[1].weight.detach().clone()
    for number in (1, 2):
        step(model, optimizer)
        state = callback._rebuilt[2].counters[0]
        assert state["step"] == number
        assert optimizer.param_groups[0]["step"] == 3 + number
        if number == 1:  # the corrected mean of one gradient is the gradient
            gradient = model.layers[1].weight.grad
            assert gradient is not None
            torch.testing.assert_close(before - model.layers[1].weight.detach(), 0.1 * gradient)
    # The state holds them.
    saved = callback.state_dict()
    again = StageRecoveryCallback(lr_scale=1.0)
    again.load_state_dict(saved)
    assert again._rebuilt[2].counters[0]["step"] == 2
    assert float(again._rebuilt[2].counters[0]["peak"]) == 3.0


# Runs of a Trainer --------------------------------------------------------------------------------


def llama(layers: int = 4) -> Any:
    return build_tiny_llama(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


class LoseAt(TrainerCallback):
    """Overwrite a stage of one layer after a step, and have it rebuilt."""

    def __init__(self, callback: StageRecoveryCallback, step: int, stage: int) -> None:
        self.callback, self.step, self.stage = callback, step, stage

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            lose(model.model, self.stage - 1)
            self.callback.recover(self.stage)


def trained(
    folder: Path,
    *,
    lose_at: tuple[int, int] | None = None,
    checkpoint: Path | None = None,
    stop: int | None = None,
    settings: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    callback = StageRecoveryCallback(**(settings or {}))
    others: list[TrainerCallback] = [] if lose_at is None else [LoseAt(callback, *lose_at)]
    others += [] if stop is None else [StopAt(stop)]
    trainer = build(folder, callback, others=others, model=llama(), **arguments)
    if stop is None:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    else:
        with pytest.raises(InterruptedError):
            trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{"lr_recover_steps": 4}, {"swap_prob": 0.5}], ids=["decay", "swap"])
def test_a_run_resumed_after_a_recovery_is_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    # Rebuilt at step 5, before the checkpoint of that step: the optimizer's file lacks the stage's state.
    for lost_at in (3, MIDDLE):
        options: dict[str, Any] = {"lose_at": (lost_at, 2), "settings": settings}
        whole = trained(tmp_path / f"whole{lost_at}", **options)
        trained(tmp_path / f"cut{lost_at}", stop=MIDDLE + 2, **options)
        start = tmp_path / f"cut{lost_at}" / f"checkpoint-{MIDDLE}"
        resumed = trained(tmp_path / f"resumed{lost_at}", settings=settings, checkpoint=start)
        assert equal(parameters(resumed), parameters(whole))
        name = f"checkpoint-{STEPS}"
        files = [
            load_state(tmp_path / f"{run}{lost_at}" / name, "hf_ext_stage_recovery")
            for run in ("whole", "resumed")
        ]
        assert files[0] == files[1]
        assert files[0][0]["state"]["rebuilt"]["2"]["updates"] == STEPS - lost_at


def test_the_factor_and_the_fresh_state_matter(tmp_path: Path) -> None:
    plain = trained(tmp_path, lose_at=(3, 2), settings={"lr_scale": 1.0}, save_strategy="no")
    raised = trained(tmp_path, lose_at=(3, 2), settings={"lr_scale": 1.5}, save_strategy="no")
    assert not equal(parameters(plain), parameters(raised))
    assert logged(plain, "learning_rate") == logged(raised, "learning_rate")
    assert [len(group["params"]) for group in raised.optimizer.param_groups] == [
        len(group["params"]) for group in plain.optimizer.param_groups
    ]


class Norms(TrainerCallback):
    """Each layer's gradient norm, as a backward hook sees it: before the Trainer clips."""

    def __init__(self, model: Any) -> None:
        self.squares = [0.0] * 4
        for layer in range(4):
            for parameter in model.model.layers[layer].parameters():
                parameter.register_post_accumulate_grad_hook(self._of(layer))

    def _of(self, layer: int) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.squares[layer] += float(parameter.grad.double().square().sum())

        return add

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.squares = [0.0] * 4


def test_norms_are_those_before_clipping_and_lie_in_the_checkpoint(tmp_path: Path) -> None:
    model = llama()
    norms = Norms(model)
    build(tmp_path, StageRecoveryCallback(), others=[norms], model=model, max_grad_norm=1e-3).train()
    found = recorded_gradient_norms(tmp_path / f"checkpoint-{STEPS}")
    assert list(found) == [0, 1, 2, 3]
    assert list(found.values()) == pytest.approx([square**0.5 for square in norms.squares], rel=1e-4)
    assert min(found.values()) > 1e-3  # clipped ones are below
    with pytest.raises(FileNotFoundError, match="recorded by StageRecoveryCallback"):
        recorded_gradient_norms(tmp_path)


def test_every_other_micro_batch_runs_with_swapped_stages(tmp_path: Path) -> None:
    model = llama()
    order: list[list[int]] = []
    numbers = {id(layer): index for index, layer in enumerate(model.model.layers)}

    def begin(*_: Any) -> None:
        order.append([])

    def passed(layer: nn.Module, *_: Any) -> None:
        order[-1].append(numbers[id(layer)])

    model.register_forward_pre_hook(begin)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(passed)
    settings: dict[str, Any] = {"swap_prob": 0.5}
    trainer = build(
        tmp_path, StageRecoveryCallback(**settings), model=model, max_steps=4, eval_strategy="epoch"
    )
    trainer.train()
    trainer.evaluate()
    straight, swapped = [0, 1, 2, 3], [1, 0, 3, 2]
    assert order[:4] == [straight, swapped] * 2
    assert all(found == straight for found in order[4:])
    names = [name for name, _ in model.model.layers.named_children()]
    assert names == ["0", "1", "2", "3"]
    assert [numbers[id(layer)] for layer in model.model.layers] == straight
    with pytest.raises(ValueError, match="swaps stages for every other micro-batch"):
        build(tmp_path, StageRecoveryCallback(**settings), attach=False, model=llama())
