"""What the base gives every callback: state, marks, refusals, order, undo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import HPSearchBackend

from hf_ext._compat.transformers import checkpoint_of
from hf_ext.callbacks import _base
from hf_ext.callbacks._base import Callback, Neutral, Run, register_callback
from hf_ext.core.registry import forget
from tests.callbacks.runs import SaveAt, StopAt, build, equal, parameters

EVENTS: list[str] = []
FOLDERS: list[Path] = []


@dataclass(kw_only=True, eq=False, repr=False)
class Counting(Callback):
    """Count steps, and scale a parameter while a run is on.

    Args:
        factor: What a decay is multiplied by, above 0.
        name: Anything.
    """

    may_change: ClassVar[frozenset[str]] = frozenset({"name"})

    factor: float = 2.0
    name: str | None = None

    def reset(self) -> None:
        self.count, self.mean = 0, torch.zeros(2)
        self._groups: list[dict[str, Any]] = []

    def begin(self, run: Run) -> None:
        EVENTS.append("begin")
        self._groups = run.optimizer.param_groups
        self._decays = [group["weight_decay"] for group in self._groups]
        for group in self._groups:
            group["weight_decay"] = 0.01 * self.factor

    def undo(self) -> None:
        EVENTS.append("undo")
        for group, decay in zip(self._groups, self._decays, strict=True):
            group["weight_decay"] = decay

    def saved(self, run: Run, folder: Path) -> None:
        assert folder.parent == run.output_dir
        FOLDERS.append(run.output_dir)

    def finish(self, run: Run) -> None:
        EVENTS.append("finish")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1
        self.mean += torch.tensor([1.0, state.global_step])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]


@pytest.fixture(autouse=True)
def _registered() -> Any:
    register_callback("counting", summary="counts", paper=None, neutral=Neutral({}, {}))(Counting)
    EVENTS.clear()
    FOLDERS.clear()
    yield
    forget("callback", "counting")


def test_state_of_scalars_and_tensors_is_restored(tmp_path: Path) -> None:
    build(tmp_path, Counting(), others=[StopAt(99)]).train()
    content = json.loads((tmp_path / "checkpoint-5" / "hf_ext_counting.json").read_text())
    assert content["scalars"] == {
        "settings": {"factor": 2.0, "name": None},
        "state": {"count": 5},
        "step": 5,
        "world_size": 1,
    }
    again = Counting()
    build(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.count == 10
    assert again.mean.tolist() == [10.0, 55.0]


def test_two_saves_of_one_step_and_no_step_of_the_loop_in_between(tmp_path: Path) -> None:
    # The end of an epoch saves after the last step has.
    trainer = build(tmp_path, Counting(), save_strategy="epoch", max_steps=-1, num_train_epochs=1)
    trainer.train()
    content = json.loads((tmp_path / "checkpoint-32" / "hf_ext_counting.json").read_text())
    assert content["scalars"]["state"] == {"count": 32}


@pytest.mark.parametrize("attach", [True, False])
def test_state_is_written_with_the_model_alone_too(attach: bool, tmp_path: Path) -> None:
    build(tmp_path, Counting(), attach=attach, save_only_model=True).train()
    assert (tmp_path / "checkpoint-10" / "hf_ext_counting.json").is_file()


def test_an_attached_callback_writes_before_the_checkpoint_is_whole(tmp_path: Path) -> None:
    order: list[str] = []

    class Watching(TrainerCallback):
        def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.append("push")

    trainer: Any = build(tmp_path, Counting(), others=[Watching()])
    original = TrainerState.save_to_json

    def save_to_json(self: TrainerState, path: str) -> None:
        assert (Path(path).parent / "hf_ext_counting.safetensors").is_file()
        order.append("state")
        original(self, path)

    TrainerState.save_to_json = save_to_json
    try:
        trainer.train()
    finally:
        TrainerState.save_to_json = original
    assert order == ["state", "state"]


def test_undo_comes_after_finish_and_after_an_exception(tmp_path: Path) -> None:
    trainer = build(tmp_path, Counting())
    trainer.train()
    assert EVENTS == ["begin", "finish", "undo"]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    EVENTS.clear()
    broken = build(tmp_path, Counting(), others=[StopAt(3)])
    with pytest.raises(InterruptedError):
        broken.train()
    assert EVENTS == ["begin", "undo"]
    assert {group["weight_decay"] for group in broken.optimizer.param_groups} == {0.0}


def test_on_events_alone_the_next_run_undoes_what_an_exception_left(tmp_path: Path) -> None:
    stop = StopAt(3)
    trainer = build(tmp_path, Counting(), attach=False, others=[stop])
    with pytest.raises(InterruptedError):
        trainer.train()
    stop.step = 99
    trainer.train()
    assert EVENTS == ["begin", "undo", "begin", "finish", "undo"]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}


def test_a_failing_begin_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Counting.begin

    def fails(self: Counting, run: Run) -> None:
        begin(self, run)
        raise RuntimeError("no")

    monkeypatch.setattr(Counting, "begin", fails)
    with pytest.raises(RuntimeError, match="no"):
        build(tmp_path, Counting(), attach=False).train()
    assert EVENTS == ["begin", "undo"]


def test_settings_of_the_checkpoint(tmp_path: Path) -> None:
    build(tmp_path, Counting()).train()
    start = str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match=r"factor must be 2\.0, as in the checkpoint, got 3\.0"):
        build(tmp_path, Counting(factor=3.0)).train(resume_from_checkpoint=start)
    build(tmp_path, Counting(name="other")).train(resume_from_checkpoint=start)


def test_a_setting_that_a_checkpoint_of_an_earlier_version_lacks_is_the_default(tmp_path: Path) -> None:
    build(tmp_path, Counting()).train()
    path = tmp_path / "checkpoint-5" / "hf_ext_counting.json"
    content = json.loads(path.read_text())
    del content["scalars"]["settings"]["factor"]
    path.write_text(json.dumps(content))
    build(tmp_path, Counting()).train(resume_from_checkpoint=str(path.parent))
    with pytest.raises(ValueError, match=r"factor must be 2\.0, as in the checkpoint, got 3\.0"):
        build(tmp_path, Counting(factor=3.0)).train(resume_from_checkpoint=str(path.parent))


def test_state_of_another_step_is_refused(tmp_path: Path) -> None:
    build(tmp_path, Counting()).train()
    for path in (tmp_path / "checkpoint-10").glob("hf_ext_*"):
        (tmp_path / "checkpoint-5" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="step must be 5, got 10"):
        build(tmp_path, Counting()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_each_process_s_own_state_needs_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "per_rank", True)
    build(tmp_path, Counting()).train()
    assert (tmp_path / "checkpoint-5" / "hf_ext_counting.rank0.safetensors").is_file()
    start = str(tmp_path / "checkpoint-5")
    build(tmp_path / "again", Counting()).train(resume_from_checkpoint=start)
    monkeypatch.setattr(_base.dist, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="world size must be 1, as in the checkpoint, got 2"):
        build(tmp_path / "more", Counting()).train(resume_from_checkpoint=start)


def test_upstream_s_own_restoring_leaves_the_callback_alone(tmp_path: Path) -> None:
    whole = build(tmp_path, Counting())
    whole.train()
    held = Counting()
    trainer = build(tmp_path, held, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert held in trainer.callback_handler.callbacks
    assert held.count == 10
    assert equal(parameters(trainer), parameters(whole))


def test_a_run_without_the_callback_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    build(tmp_path, Counting()).train()
    build(tmp_path, others=[]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_run_without_the_callback_hands_no_mark_on(tmp_path: Path) -> None:
    build(tmp_path / "with", Counting()).train()
    start = str(tmp_path / "with" / "checkpoint-5")
    build(tmp_path / "without", others=[SaveAt(8)]).train(resume_from_checkpoint=start)
    again = Counting()
    build(tmp_path / "again", again).train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-8"))
    assert again.count == 2


def test_a_mark_of_an_earlier_version_has_no_step(tmp_path: Path) -> None:
    build(tmp_path, Counting()).train()
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    content = json.loads(path.read_text())
    assert content["stateful_callbacks"]["hf_ext.counting"] == {"args": {}, "attributes": {"step": 5}}
    content["stateful_callbacks"]["hf_ext.counting"]["attributes"] = {}
    path.write_text(json.dumps(content))
    again = Counting()
    build(tmp_path, again).train(resume_from_checkpoint=str(path.parent))
    assert again.count == 10


# Hyperparameter search ----------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_each_trial_of_a_search_has_its_own_folder(
    attach: bool, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `hyperparameter_search` calls it, without a package that chooses the trials.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    callback = Counting()
    trainer: Any = build(tmp_path, callback, attach=attach)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    trainer.hp_name = (lambda trial: f"trial{trial.number}") if named else None
    for number, factor in enumerate((1e-2, 1e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": factor}))
        folder = tmp_path / (f"trial{number}" if named else f"run-{number}")
        content = json.loads((folder / "checkpoint-5" / "hf_ext_counting.json").read_text())
        assert content["scalars"]["state"] == {"count": 5}
        assert [folder, folder] == FOLDERS
        FOLDERS.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["trial0", "trial1"] if named else ["run-0", "run-1"]
    )
    trainer.hp_search_backend = None
    resumed = Counting()
    last = tmp_path / ("trial1" if named else "run-1")
    build(tmp_path / "again", resumed).train(resume_from_checkpoint=str(last / "checkpoint-5"))
    assert resumed.count == 10


def test_a_state_knows_the_checkpoint_that_it_was_read_from(tmp_path: Path) -> None:
    state = TrainerState()
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    loaded = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert checkpoint_of(loaded) == tmp_path.resolve()
    assert checkpoint_of(state) is None
    loaded.save_to_json(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_text() == (tmp_path / "trainer_state.json").read_text()


def test_types_are_checked_and_text_that_spells_a_number_is_one() -> None:
    assert Counting(factor="1e-3").factor == 1e-3  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factor"):
        Counting(factor=[1.0])  # type: ignore[arg-type]
    assert repr(Counting(name="a")) == "Counting(name='a')"


def test_state_tensors_come_back_with_their_bits(tmp_path: Path) -> None:
    callback = Counting()
    trainer = build(tmp_path, callback)
    trainer.train()
    state: dict[str, Tensor] = callback.read_state(tmp_path / "checkpoint-10")
    assert torch.equal(state["mean"], callback.mean)
