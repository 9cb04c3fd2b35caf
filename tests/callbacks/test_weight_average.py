"""EMA, SWA and LAWA: the hand-computed cases, the average in a run and in evaluations, batch norms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_ext.callbacks import AdaptiveBatchSizeCallback, WeightAverageCallback
from hf_ext.callbacks._base import Run
from hf_ext.core.state import load_state
from tests.callbacks.runs import BEST, MIDDLE, STEPS, Bumpy, StopAt, build, equal, logged, parameters
from tests.reference import weight_average as reference


class Loop:
    """A module whose weights the test sets, stepped as a Trainer would."""

    def __init__(self, theta: list[float], /, steps: int = 100, **settings: Any) -> None:
        self.model = nn.Module()
        self.model.register_parameter("w", nn.Parameter(torch.tensor(theta)))
        self.callback = WeightAverageCallback(**settings)
        self.state = TrainerState(max_steps=steps, save_steps=1)
        args: Any = SimpleNamespace(load_best_model_at_end=False, distributed_state=None)
        self.callback.begin(Run(args, self.state, TrainerControl(), self.model, None, None))

    def step(self, theta: list[float], name: str = "w", skipped: bool = False) -> list[float] | None:
        with torch.no_grad():
            self.model.get_parameter(name).copy_(torch.tensor(theta))
        nothing: Any = None
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        self.callback.on_optimizer_step(nothing, self.state, nothing, optimizer=optimizer)
        self.state.global_step += 1
        return self.average(name)

    def average(self, name: str = "w") -> list[float] | None:
        found = self.callback.averaged()
        return found[name].tolist() if name in found else None


def walk(loop: Loop, *values: float) -> list[float | None]:
    found = [loop.step([value]) for value in values]
    return [None if value is None else value[0] for value in found]


# The averages -------------------------------------------------------------------------------------


def test_ema_by_hand() -> None:
    assert walk(Loop([0.0], decay=0.9), 0, 1, 1, 1) == pytest.approx([0, 0.1, 0.19, 0.271], abs=1e-6)
    corrected = walk(Loop([7.0], decay=0.9, bias_correction=True), 0, 1, 1, 1)
    assert corrected == pytest.approx([0, 0.526316, 0.701107, 0.788020], abs=1e-6)
    assert walk(Loop([0.0], decay=0.0), 3, 4) == [3, 4]


def test_swa_and_lawa_by_hand() -> None:
    assert walk(Loop([9.0], method="swa", start=0.0, every=1), 1, 2, 3)[-1] == pytest.approx(2)
    lawa = walk(Loop([9.0], method="lawa", last=3, every=1), 1, 2, 3, 4, 5)
    assert lawa == pytest.approx([1, 1.5, 2, 3, 4], abs=1e-6)


def test_the_steps_of_the_samples() -> None:
    swa = Loop([0.0], steps=10, method="swa", start=0.45, every=2)
    assert walk(swa, *range(1, 6)) == [None] * 5
    assert walk(swa, *range(6, 11)) == pytest.approx([6, 6, 7, 7, 8])
    assert swa.callback.scalars() == {"samples": 3.0}
    ema = Loop([5.0], steps=4, start=0.5, decay=0.5)  # from the weights of step 2 on
    assert walk(ema, 1, 2, 3, 4) == [None, 2.0, 2.5, 3.25]
    assert Loop([0.0], method="swa").callback._every == 100
    swa = Loop([0.0], method="swa")
    assert swa.callback._first(swa.state) == 75
    lawa = Loop([0.0], method="lawa")
    assert (lawa.callback._every, lawa.callback._first(lawa.state)) == (1, 0)


def test_samples_of_a_run_that_a_growing_batch_makes_shorter(tmp_path: Path) -> None:
    grows = AdaptiveBatchSizeCallback(batch_max=32, eta=0.1)
    swa = WeightAverageCallback(method="swa", every=1)
    trainer = build(tmp_path, grows, swa, max_steps=64, save_strategy="no", gradient_accumulation_steps=2)
    trainer.train()
    end = trainer.state.global_step
    assert end < 48  # 0.75 of the settings' length
    assert logged(trainer, "weight_average/samples")[-1] == end - math.ceil(0.75 * end) + 1


def test_a_run_that_ends_before_the_first_sample_says_so(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    swa = WeightAverageCallback(method="swa", every=1)
    trainer = build(tmp_path, swa, others=[Stop()], save_strategy="no")
    with pytest.warns(UserWarning, match="step 3 before the first sample: the model has its raw weights"):
        trainer.train()


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_ema_equals_the_sum_over_its_weights(warmup: bool, bias_correction: bool) -> None:
    thetas = torch.randn(41, 5, generator=torch.Generator().manual_seed(1)).tolist()
    settings: dict[str, Any] = {"warmup": warmup, "bias_correction": bias_correction}
    loop = Loop(thetas[0], decay=0.93, **settings)
    for theta in thetas[1:]:
        loop.step(theta)
    expected = reference.ema(thetas[0], thetas[1:], 0.93, **settings)
    assert loop.average() == pytest.approx(expected, abs=1e-5)


def test_equal_weights_have_themselves_as_their_mean() -> None:
    theta = torch.randn(50, generator=torch.Generator().manual_seed(2)).tolist()
    each: list[dict[str, Any]] = [{"method": "swa", "start": 0.0}, {"method": "lawa"}, {"decay": 0.9}]
    for settings in each:
        loop = Loop(theta, every=1, **settings)
        for _ in range(9):
            loop.step(theta)
        assert loop.average() == torch.tensor(theta).tolist()


def test_a_skipped_update_does_not_count() -> None:
    loop = Loop([0.0], decay=0.5)
    loop.step([4.0], skipped=True)
    assert loop.average() == [0.0]
    assert loop.callback.scalars() == {"samples": 0.0, "start_share": 1.0}


def test_a_tensor_that_begins_to_train_joins() -> None:
    each: list[tuple[dict[str, Any], float]] = [
        ({"decay": 0.5}, 1.5),
        ({"decay": 0.5, "bias_correction": True}, 1.0 + 4 / 7),
        ({"method": "swa", "start": 0.0}, 1.0 + 1 / 3),
        ({"method": "lawa"}, 1.5),
    ]
    for settings, expected in each:
        loop = Loop([0.0], every=1, **settings)
        late = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        loop.model.register_parameter("late", late)
        loop.step([1.0])
        assert loop.average("late") is None
        late.requires_grad_(True)
        loop.step([1.0], "late")
        assert loop.average("late") == [1.0]
        assert loop.step([2.0], "late") == pytest.approx([expected])


def test_half_precision_weights_have_a_full_precision_average() -> None:
    each: list[dict[str, Any]] = [{"decay": 0.99}, {"method": "lawa"}, {"method": "swa", "start": 0.0}]
    for settings in each:
        loop = Loop([0.5], every=1, **settings)
        loop.model.get_parameter("w").data = loop.model.get_parameter("w").data.bfloat16()
        for value in (0.5, 0.50390625):  # one bit above
            loop.step([value])
        (average,) = loop.callback.averaged().values()
        assert average.dtype == torch.float32
        assert 0.5 < average.item() < 0.50390625


def test_steps_without_a_sample_are_refused() -> None:
    for settings in ({"every": 101}, {"method": "swa", "start": 0.7, "every": 60}):
        with pytest.raises(ValueError, match="every must be such that a multiple of it lies between"):
            Loop([0.0], **settings)


# In a run -----------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Keep the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})


METHODS: list[dict[str, Any]] = [
    {"decay": 0.8},
    {"method": "swa", "start": 0.3, "every": 3},
    {"method": "lawa", "last": 3, "every": 2},
]


def expected(settings: dict[str, Any], start: dict[str, Tensor], watch: Watch, step: int) -> dict[str, Any]:
    found = {}
    for name, value in start.items():
        thetas = [weights[name].flatten().tolist() for weights in watch.weights[:step]]
        if settings.get("method") == "swa":
            found[name] = reference.mean(thetas[2::3])  # steps 3, 6, 9
        elif settings.get("method") == "lawa":
            found[name] = reference.mean(thetas[1::2][-3:])
        else:
            found[name] = reference.ema(value.flatten().tolist(), thetas, 0.8)
    return found


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_ends_with_the_average(settings: dict[str, Any], accumulation: int, tmp_path: Path) -> None:
    watch, plain_watch = Watch(), Watch()
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    trainer = build(tmp_path, WeightAverageCallback(**settings), others=[watch], **options)
    start = parameters(trainer)
    trainer.train()
    wanted = expected(settings, start, watch, STEPS)
    for name, value in parameters(trainer).items():
        assert value.flatten().tolist() == pytest.approx(wanted[name], abs=1e-6), name
    plain = build(tmp_path / "plain", others=[plain_watch], **options)
    plain.train()
    assert all(equal(a, b) for a, b in zip(watch.weights, plain_watch.weights, strict=True))
    assert logged(trainer, "loss") == logged(plain, "loss")


class Seen(TrainerCallback):
    """Keep the state of the model that an evaluation has used."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.weights[state.global_step] = {n: v.clone() for n, v in model.state_dict().items()}


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"}


@pytest.mark.parametrize("settings", METHODS)
def test_evaluations_are_of_the_average_and_leave_every_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    seen, watch, plain = Seen(), Watch(), Watch()
    trainer = build(tmp_path, WeightAverageCallback(**settings), others=[seen, watch], **EVALUATED)
    start = parameters(trainer)
    trainer.train()
    for step in (5, STEPS):
        for name, values in expected(settings, start, watch, step).items():
            assert seen.weights[step][name].flatten().tolist() == pytest.approx(values, abs=1e-6), name
    build(tmp_path, others=[plain], save_strategy="no").train()
    assert all(equal(a, b) for a, b in zip(watch.weights, plain.weights, strict=True))
    after = trainer.evaluate()
    assert after["eval_loss"] == [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-2]


def test_checkpoints_hold_raw_weights_and_the_average(tmp_path: Path) -> None:
    watch = Watch()
    trainer = build(tmp_path, WeightAverageCallback(decay=0.8), others=[watch])
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, watch.weights[-1][name]) for name, value in weights.items())
    scalars, tensors = load_state(folder, "hf_ext_weight_average")
    assert {f"average.{n}": v.tolist() for n, v in parameters(trainer).items()} == {
        name: value.tolist() for name, value in tensors.items()
    }
    assert scalars["state"] == {"taken": STEPS, "left": pytest.approx(0.8**STEPS)}


def test_an_exception_leaves_the_raw_weights(tmp_path: Path) -> None:
    watch, callback = Watch(), WeightAverageCallback(method="lawa", every=1)
    trainer = build(tmp_path, callback, others=[watch, StopAt(7)], save_strategy="no")
    with pytest.raises(InterruptedError):
        trainer.train()
    assert equal(parameters(trainer), watch.weights[-1])
    assert callback._samples == []


@pytest.mark.parametrize(
    "settings", [{"decay": 0.8, "bias_correction": True, "warmup": True}, {"method": "lawa", "every": 1}]
)
def test_resumed_with_evaluations(settings: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {**EVALUATED, "save_strategy": "steps"}
    whole = build(tmp_path / "whole", WeightAverageCallback(**settings), **options)
    whole.train()
    resumed = build(tmp_path / "resumed", WeightAverageCallback(**settings), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("settings", [{"decay": 0.8}, {"method": "lawa", "every": 1, "last": 3}])
def test_the_best_checkpoint_s_average(settings: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "cut"):
        trainer = build(
            tmp_path / name,
            WeightAverageCallback(best_from="average", **settings),
            load_best_model_at_end=True,
            **BEST,
        )
        bumpy = Bumpy(trainer)
        if name == "whole":
            trainer.train()
            assert equal(parameters(trainer), bumpy.seen[MIDDLE - 1])
            assert not equal(parameters(trainer), bumpy.seen[-1])
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE + 2}"))
        ends.append(parameters(trainer))
    assert equal(*ends)
    # The weights themselves are another model than their average.
    raw = load_file(tmp_path / "whole" / f"checkpoint-{MIDDLE}" / "model.safetensors")
    assert not all(torch.equal(value, ends[0][name]) for name, value in raw.items())


def test_the_best_checkpoint_before_the_first_sample(tmp_path: Path) -> None:
    callback = WeightAverageCallback(method="swa", start=0.8, every=1, best_from="average")
    trainer = build(tmp_path, callback, load_best_model_at_end=True, **BEST)
    bumpy = Bumpy(trainer)
    trainer.train()
    assert callback._first(trainer.state) > MIDDLE
    assert equal(parameters(trainer), bumpy.seen[MIDDLE - 1])  # then the raw weights were evaluated


def test_refusals(tmp_path: Path) -> None:
    best = {**EVALUATED, "save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"must be False with WeightAverageCallback.*best_from='average'"):
        build(tmp_path, WeightAverageCallback(), **best).train()
    with pytest.raises(ValueError, match="evaluates the averaged weights"):
        build(tmp_path, WeightAverageCallback(), attach=False, **EVALUATED)
    with pytest.raises(ValueError, match="params must be the name of some trainable tensor"):
        build(tmp_path, WeightAverageCallback(params="lora_"), save_strategy="no").train()
    args: Any = SimpleNamespace(
        load_best_model_at_end=False,
        distributed_state=SimpleNamespace(distributed_type="DistributedType.DEEPSPEED"),
    )
    run = Run(args, TrainerState(), TrainerControl(), nn.Linear(2, 2), None, None)
    with pytest.raises(ValueError, match="weight_average must be used without DeepSpeed"):
        WeightAverageCallback().begin(run)


def test_processes_whose_weights_differ_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_ext.callbacks import HypergradientCallback

    trainer = build(tmp_path, HypergradientCallback(), WeightAverageCallback(), save_strategy="no")
    monkeypatch.setattr("hf_ext.callbacks._averaged_weights.dist.is_distributed", lambda: True)
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, WeightAverageCallback))
    run = Run(trainer.args, TrainerState(), TrainerControl(), trainer.model, None, None)
    with pytest.raises(ValueError, match=r"used without it .*HypergradientCallback"):
        callback.begin(run)


def test_large_buffers_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ext.callbacks.weight_average.LARGE", 16)
    with pytest.warns(UserWarning, match=r"weight_average keeps up to .* GiB of weights"):
        Loop([0.0], method="lawa")


# Batch norms --------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Tokens, their mean, a batch norm, dropout, logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(251, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 251)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.norm(self.embedding(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, input_ids[:, 0]), "logits": logits}


class Statistics(TrainerCallback):
    """Keep the running statistics before the first step and after each."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(kwargs["model"])

    def _keep(self, model: Normed) -> None:
        self.found.append({name: value.clone() for name, value in model.norm.named_buffers()})


def normed_run(tmp_path: Path, *callbacks: Any, **options: Any) -> tuple[Normed, Statistics]:
    statistics, model = Statistics(), Normed()
    options = {"save_strategy": "no", "learning_rate": 0.1, **options}
    build(tmp_path, *callbacks, model=model, others=[statistics], **options).train()
    return model, statistics


@pytest.mark.parametrize("bn", ["pool", "average"])
def test_statistics_of_the_samples(bn: str, tmp_path: Path) -> None:
    callback = WeightAverageCallback(method="swa", start=0.0, every=5, bn=bn)
    model, statistics = normed_run(tmp_path, callback)
    (a, b) = statistics.found[5], statistics.found[10]
    mean = (a["running_mean"] + b["running_mean"]) / 2
    variance = (a["running_var"] + b["running_var"]) / 2
    if bn == "pool":
        variance = variance + (a["running_mean"] - b["running_mean"]) ** 2 / 4
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert int(model.norm.num_batches_tracked or 0) == STEPS


def test_means_zero_and_two_have_a_pooled_variance_of_two() -> None:
    for bn, expected_variance in (("pool", 2.0), ("average", 1.0)):
        loop = Loop([0.0], method="swa", start=0.0, every=1, bn=bn)
        norm = nn.BatchNorm1d(1)
        loop.model.add_module("norm", norm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for mean in (0.0, 2.0):
            norm.running_mean.fill_(mean)
            loop.step([0.0])
        loop.callback.write_averaged(loop.callback.averaged())
        assert norm.running_mean.tolist() == [1.0]
        assert norm.running_var.tolist() == [expected_variance]


def test_recalibrated_statistics_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    model, _ = normed_run(tmp_path, WeightAverageCallback(decay=0.5))
    from tests.callbacks.runs import rows

    with torch.no_grad():
        inputs = model.embedding(torch.tensor(rows()["input_ids"])).mean(1)
    torch.testing.assert_close(model.norm.running_mean, inputs.mean(0))
    torch.testing.assert_close(model.norm.running_var, inputs.var(0))


def test_evaluations_take_statistics_anew_and_leave_every_bit(tmp_path: Path) -> None:
    seen = Seen()
    statistics, model = Statistics(), Normed()
    trainer = build(
        tmp_path,
        WeightAverageCallback(decay=0.5, bn_batches=2),
        model=model,
        others=[seen, statistics],
        **{**EVALUATED, "learning_rate": 0.1},
    )
    trainer.train()
    plain, plain_statistics = normed_run(tmp_path / "plain", **EVALUATED)  # evaluations draw numbers
    assert not equal(parameters(trainer), dict(plain.named_parameters()))
    for a, b in zip(statistics.found, plain_statistics.found, strict=True):
        assert equal(a, b)
    assert int(seen.weights[5]["norm.num_batches_tracked"]) == 2
    assert not torch.equal(seen.weights[5]["norm.running_mean"], statistics.found[5]["running_mean"])


def test_statistics_need_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bn must be 'pool' or 'average' without hf_ext\.attach"):
        build(tmp_path, WeightAverageCallback(), attach=False, model=Normed(), save_strategy="no").train()
    build(
        tmp_path, WeightAverageCallback(bn="pool"), attach=False, model=Normed(), save_strategy="no"
    ).train()


@pytest.mark.parametrize("bn", ["recalibrate", "pool"])
def test_resumed_with_batch_norms(bn: str, tmp_path: Path) -> None:
    ends = []
    for resume in (None, str(tmp_path / "0" / f"checkpoint-{MIDDLE}")):
        trainer = build(
            tmp_path / str(len(ends)),
            WeightAverageCallback(method="swa", start=0.0, every=1, bn=bn),
            model=Normed(),
            learning_rate=0.1,
        )
        trainer.train(resume_from_checkpoint=resume)
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})  # pyright: ignore
    assert equal(*ends)
