"""`attach`: any trainer, its own class underneath, refusals that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

import hf_ext
from hf_ext._compat.transformers import (
    TrainerSeams,
    announce_callbacks,
    date_marks,
    remember_checkpoint,
    remember_run,
)
from hf_ext.callbacks import InfiniteLRCallback, RefinedLinearDecayCallback
from hf_ext.callbacks._attach import attached_class
from tests.callbacks.runs import build


def test_the_trainer_stays_the_object_and_keeps_its_class(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    assert hf_ext.attach(trainer, InfiniteLRCallback()) is trainer
    assert isinstance(trainer, Trainer)
    assert type(trainer) is attached_class(Trainer)
    assert type(trainer).__name__ == "Trainer"
    # Calls add to each other and subclass once.
    hf_ext.attach(trainer)
    assert type(trainer).__mro__.count(TrainerSeams) == 1


def test_a_trainer_of_the_user_s_keeps_its_overrides(tmp_path: Path) -> None:
    class Mine(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "mine": 1.0}, *args, **kwargs)

    trainer: Any = build(tmp_path, save_strategy="no", attach=False)
    trainer.__class__ = Mine
    hf_ext.attach(trainer, InfiniteLRCallback(warmup_steps=1, cooldown_steps=2)).train()
    assert all(entry["mine"] == 1.0 for entry in trainer.state.log_history)


def test_the_seams_exist_upstream_with_these_parameters() -> None:
    import inspect

    expected = {
        "train": None,
        "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "set_initial_training_values": ["self", "args", "dataloader"],
        "_init_training_state": [
            *("self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
            *("resume_from_checkpoint", "trial"),
        ],
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "floating_point_ops": ["self", "inputs"],
        "_track_num_input_tokens": ["self", "inputs"],
        "evaluate": None,
        "_save_optimizer_and_scheduler": ["self", "output_dir"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_get_output_dir": ["self", "trial"],
    }
    for name, wanted in expected.items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert wanted is None or found == wanted, name
    own = {name for name, value in vars(TrainerSeams).items() if callable(value)} - {"_having", "_through"}
    assert own == set(expected) - {"_load_from_checkpoint", "_get_output_dir"}
    told = list(inspect.signature(TrainerState.init_training_references).parameters)
    assert told == ["self", "trainer", "max_steps", "num_train_epochs", "trial"]
    assert list(inspect.signature(TrainerState.save_to_json).parameters) == ["self", "json_path"]


def test_methods_of_upstream_are_wrapped_once() -> None:
    def methods() -> list[Any]:
        own = [TrainerState.init_training_references, TrainerState.save_to_json, CallbackHandler.add_callback]
        return [*own, TrainerState.load_from_json.__func__]

    before = methods()
    for wrap in (remember_checkpoint, remember_run, date_marks, announce_callbacks):
        wrap()
    assert methods() == before
    assert [method.__name__ for method in before] == [method.__wrapped__.__name__ for method in before]


@pytest.mark.parametrize("other", [object(), TrainerCallback(), InfiniteLRCallback])
def test_other_callbacks_are_refused(other: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="attach takes callbacks of hf_ext"):
        build(tmp_path, other)


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got str"):
        hf_ext.attach("trainer", InfiniteLRCallback())


def test_a_refused_pair_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = build(tmp_path, attach=False)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="both steer the run's learning rate"):
        hf_ext.attach(trainer, InfiniteLRCallback(), RefinedLinearDecayCallback())
    assert trainer.callback_handler.callbacks == before
    assert type(trainer) is Trainer
    with pytest.raises(ValueError, match="both steer the run's learning rate"):
        build(tmp_path, InfiniteLRCallback(), RefinedLinearDecayCallback(record=False), attach=False)


def test_ours_stand_after_the_flow_and_before_all_others(tmp_path: Path) -> None:
    class Other(TrainerCallback):
        pass

    for attach in (True, False):
        trainer = build(tmp_path, InfiniteLRCallback(), attach=attach, others=[Other()])
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert kinds[:2] == [DefaultFlowCallback, InfiniteLRCallback]
        assert Other in kinds[2:]


def test_a_callback_added_after_the_trainer_was_built_is_guarded_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, attach=False)
    trainer.add_callback(RefinedLinearDecayCallback())
    with pytest.raises(ValueError, match=r"hf_ext\.attach\(trainer, RefinedLinearDecayCallback\(\)\)"):
        trainer.train()


def test_attach_without_callbacks_takes_in_those_that_are_there(tmp_path: Path) -> None:
    trainer = build(tmp_path, attach=False, save_strategy="no")
    trainer.add_callback(RefinedLinearDecayCallback())
    hf_ext.attach(trainer).train()
    assert len([entry for entry in trainer.state.log_history if "refined_linear_decay/l1" in entry]) == 10
