from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.core import files
from hf_ext.core.files import (
    atomic_folder,
    read_json,
    read_tensors,
    tensor_header,
    write_bytes,
    write_json,
    write_tensors,
)

TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5], dtype=torch.bfloat16),
}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_written_file_has_its_bytes_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    write_bytes(path, b"abc")
    assert path.read_bytes() == b"abc"
    assert leftovers(path.parent) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_bytes(path, b"old")
    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*state\.json: No space left on device") as caught:
        write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_place_below_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write .*file/below"):
        write_bytes(tmp_path / "file" / "below", b"new")
    with (
        pytest.raises(OSError, match=r"cannot write .*file/below"),
        atomic_folder(tmp_path / "file" / "below"),
    ):
        pytest.fail("the block must not run")


def test_a_folder_in_the_place_of_the_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "name" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*name"):
        write_bytes(tmp_path / "name", b"new")
    assert (tmp_path / "name" / "inner").is_dir()
    assert leftovers(tmp_path) == []


def test_json_is_sorted_ends_in_a_newline_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert path.read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    assert read_json(path) == {"a": [1.5, None], "b": 1}


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{} {}"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.json is not a JSON file"):
        read_json(tmp_path / "v.json")


def test_tensors_come_back_bit_for_bit_with_dtype_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    found = read_tensors(path)
    assert list(found) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_views_and_transposes_are_stored_whole_and_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "alias": base, "t": base.T})
    found = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["alias"], base)


def test_the_header_has_the_format_mark_and_the_given_text(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, {"note": "x"})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    raw = json.loads(path.read_bytes()[8 : 8 + length])
    assert raw["__metadata__"] == {"format": "pt", "note": "x"}
    assert tensor_header(path)["w"]["shape"] == [2, 3]
    assert "__metadata__" not in tensor_header(path)


def test_no_tensors_is_a_whole_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {})
    assert read_tensors(tmp_path / "t.safetensors") == {}


def test_a_file_cut_at_any_byte_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"t\.safetensors"):
            read_tensors(path)


def test_a_byte_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"{size + 1} bytes where its header says {size}"):
        read_tensors(path)


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        _file(b"\xff\xff"),
        _file(b"[]"),
        _file(b'"ab"'),
        _file(b"{}x"),
        _file({"w": 3}),
        _file({"w": {"dtype": "F32", "shape": [1]}}),
        _file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
        _file({"w": {"dtype": "F32", "shape": [1], "data_offsets": "ab"}}),
        _file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        _file({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        (2**63).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04 this is a zip of a pickle and not a safetensors file",
        b"<!DOCTYPE html><html>a download that was an error page</html>",
    ],
)
def test_a_hostile_file_is_a_value_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        read_tensors(tmp_path / "t.safetensors")


def test_an_absent_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert leftovers(target.parent) == []


def test_the_old_folder_is_replaced_and_not_mixed_with_the_new(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("new")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert leftovers(tmp_path) == []


def test_an_error_in_the_block_passes_and_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")

    def half() -> None:
        with atomic_folder(target) as fresh:
            (fresh / "half").write_text("new")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        half()
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert leftovers(tmp_path) == []


def test_a_full_disk_at_the_end_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")
    monkeypatch.setattr(files.os, "fsync", disk_full)
    with (
        pytest.raises(OSError, match=r"cannot write .*out: No space left on device; what was there before"),
        atomic_folder(target) as fresh,
    ):
        (fresh / "half").write_text("new")
    assert (target / "kept").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_failed_last_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            disk_full()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="cannot write"), atomic_folder(target) as fresh:
        (fresh / "a").write_text("new")
    assert (target / "kept").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(OSError, match=r"cannot write .*out: a file of that name exists"),
        atomic_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "mine"


def test_one_tensor_of_a_model_is_read_whole_or_sharded(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2)}
    files.write_tensors(tmp_path / "whole" / "model.safetensors", tensors)
    for number, name in enumerate(tensors, 1):
        files.write_tensors(tmp_path / "shards" / f"model-{number}.safetensors", {name: tensors[name]})
    index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(tensors, 1)}}
    files.write_json(tmp_path / "shards" / "model.safetensors.index.json", index)
    for folder in ("whole", "shards"):
        for name, tensor in tensors.items():
            assert torch.equal(files.tensor_of_model(tmp_path / folder, name), tensor)
        with pytest.raises(ValueError, match=r"no tensor c\.weight"):
            files.tensor_of_model(tmp_path / folder, "c.weight")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        files.tensor_of_model(tmp_path / "empty", "a.weight")
    (tmp_path / "shards" / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        files.tensor_of_model(tmp_path / "shards", "b.weight")
    whole = tmp_path / "whole" / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        files.tensor_of_model(tmp_path / "whole", "a.weight")
