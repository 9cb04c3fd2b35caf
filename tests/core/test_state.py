from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.core import files
from hf_ext.core.files import write_json, write_tensors
from hf_ext.core.state import load_state, save_state


def test_scalars_and_tensors_come_back(tmp_path: Path) -> None:
    save_state(tmp_path, "part", {"step": 3, "name": "x", "mean": 0.1}, {"m": torch.tensor([1.0, -0.0])})
    scalars, tensors = load_state(tmp_path, "part")
    assert scalars == {"step": 3, "name": "x", "mean": 0.1}
    assert list(tensors) == ["m"]
    assert tensors["m"].signbit().tolist() == [False, True]


def test_without_tensors_there_is_one_file(tmp_path: Path) -> None:
    save_state(tmp_path, "part", {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]
    assert load_state(tmp_path, "part") == ({"step": 3}, {})


def test_absent_state_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path, "part")


def test_killed_between_the_files_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def second_fails(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", second_fails)
    with pytest.raises(OSError, match=r"part\.json"):
        save_state(tmp_path, "part", {"step": 1}, {"m": torch.ones(2)})
    assert (tmp_path / "part.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path, "part")


def test_tensors_of_another_save_are_refused_by_name(tmp_path: Path) -> None:
    save_state(tmp_path, "part", {}, {"m": torch.ones(2)})
    write_tensors(tmp_path / "part.safetensors", {"v": torch.ones(2)})
    with pytest.raises(ValueError, match=r"part\.safetensors does not match part\.json: m, v"):
        load_state(tmp_path, "part")


def test_a_missing_tensor_file_is_not_an_empty_state(tmp_path: Path) -> None:
    save_state(tmp_path, "part", {}, {"m": torch.ones(2)})
    (tmp_path / "part.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path, "part")


@pytest.mark.parametrize(
    "content", [[], {"scalars": {}}, {"scalars": {}, "tensors": [], "more": 1}, "text", None]
)
def test_json_of_another_form_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "part.json", content)
    with pytest.raises(ValueError, match=r"part\.json does not hold a saved state"):
        load_state(tmp_path, "part")


@pytest.mark.parametrize(
    "content",
    [
        {"scalars": [], "tensors": []},
        {"scalars": {}, "tensors": 3},
        {"scalars": {}, "tensors": {"m": 1}},
        {"scalars": {}, "tensors": [1]},
    ],
)
def test_json_with_parts_of_another_type_is_a_value_error(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "part.json", content)
    write_tensors(tmp_path / "part.safetensors", {"m": torch.ones(1)})
    with pytest.raises(ValueError, match="part"):
        load_state(tmp_path, "part")
