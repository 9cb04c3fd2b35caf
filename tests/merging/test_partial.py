"""Interrupted merges: what is on the disk at any moment, and how the same call goes on."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_ext.merging import _engine as engine
from hf_ext.merging import _partial as partial
from hf_ext.merging import merge
from tests.conftest import REPOSITORY
from tests.merging.models import equal, random_models, tensors_of


def config(models: list[Path], method: str = "ties", **options: Any) -> dict[str, Any]:
    parameters = {"density": 0.5} if method == "ties" else {}
    named = [str(model) for model in models[1:]]
    base = {"base_model": str(models[0])} if method == "ties" else {}
    return {
        "merge_method": method,
        "models": named,
        "parameters": parameters,
        "block_bytes": 65536,
        **base,
        **options,
    }


@pytest.mark.parametrize(("method", "stride"), [("ties", 3), ("linear", 4)])
def test_killed_at_any_moment_the_output_is_whole_or_absent_and_the_call_goes_on(
    method: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = random_models(tmp_path, 3)
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("crash_worker.py")
    content = json.dumps(config(models, method, threads=1, max_shard_size="1MB"))
    done = subprocess.run(
        [sys.executable, str(script), content, str(tmp_path / "work"), str(stride)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["moments"] >= 10


class Interrupted(KeyboardInterrupt):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> list[str]:
    """Stop the merge at its n-th written block; every block is recorded at once. Returns names as written."""
    written: list[str] = []
    put = engine.Engine._put

    def counted(self: Any, place: str, *arguments: Any) -> None:
        if len(written) == blocks:
            raise Interrupted
        put(self, place, *arguments)
        written.append(place)

    monkeypatch.setattr(engine.Engine, "_put", counted)
    monkeypatch.setattr(partial, "_FLUSH_AFTER", 1)
    return written


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_is_recorded_is_not_done_again(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = random_models(tmp_path, 3)
    merge(config(models, method), tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        first = interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            merge(config(models, method, threads=1), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.merge-partial" / "scans.json").exists() is (method == "ties")
    with monkeypatch.context() as patch:
        second = interrupt_after(patch, 10**9)
        # The number of threads is no part of the plan.
        result = merge(config(models, method, threads=2), tmp_path / "out", progress=False)
    assert result.resumed
    assert len(set(first) & set(second)) <= 2, "at most what was in flight is done twice"
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))
    assert not list(tmp_path.glob(".out*"))


def interrupted(models: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            merge(config(models, threads=1), out, progress=False)


def test_another_plan_is_refused_until_restart_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = random_models(tmp_path, 3)
    interrupted(models, tmp_path / "out", monkeypatch)
    other = config(models, parameters={"density": 0.25})
    with pytest.raises(ValueError, match=r"out:.*unfinished merge of another plan.*give restart"):
        merge(other, tmp_path / "out", progress=False)
    result = merge(other, tmp_path / "out", progress=False, restart=True)
    assert not result.resumed
    merge(other, tmp_path / "again", progress=False)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again"))


def test_a_parent_that_has_changed_is_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = random_models(tmp_path, 3)
    interrupted(models, tmp_path / "out", monkeypatch)
    path = models[1] / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another plan"):
        merge(config(models), tmp_path / "out", progress=False)


def test_a_torn_record_and_a_foreign_file_are_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = random_models(tmp_path, 3)
    merge(config(models), tmp_path / "whole", progress=False)
    interrupted(models, tmp_path / "out", monkeypatch)
    with (tmp_path / ".out.merge-partial" / "done.txt").open("a") as record:
        record.write("7 1")  # no newline: the block may not be on the disk
    merge(config(models), tmp_path / "out", progress=False)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = random_models(tmp_path, 3)
    interrupted(models, tmp_path / "out", monkeypatch)
    lock = os.open(tmp_path / ".out.merge-partial" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="out: another process is merging into"):
        merge(config(models), tmp_path / "out", progress=False)
    os.close(lock)
    assert merge(config(models), tmp_path / "out", progress=False).resumed


def test_an_existing_output_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    models = random_models(tmp_path, 3)
    merge(config(models), tmp_path / "out", progress=False)
    before = tensors_of(tmp_path / "out")
    with pytest.raises(ValueError, match="out must be a new folder; give overwrite"):
        merge(config(models, "linear"), tmp_path / "out", progress=False)
    assert equal(tensors_of(tmp_path / "out"), before)
    merge(config(models, "linear"), tmp_path / "out", progress=False, overwrite=True)
    assert not equal(tensors_of(tmp_path / "out"), before)


def test_a_folder_that_is_no_merge_is_never_replaced(tmp_path: Path) -> None:
    models = random_models(tmp_path, 3)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out must be an earlier merge"):
        merge(config(models), tmp_path / "precious", progress=False, overwrite=True)
    for folder in (models[1], tmp_path):
        (Path(folder) / "merge_manifest.json").write_text("{}")  # as an earlier merge has
    with pytest.raises(ValueError, match="out must be a folder apart from the models'"):
        merge(config(models), models[1], progress=False, overwrite=True)
    with pytest.raises(ValueError, match="out must be a folder apart from the models'"):
        merge(config(models), tmp_path, progress=False, overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_told_before_and_leaves_nothing_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import shutil
    from types import SimpleNamespace

    models = random_models(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="MiB free, and the merge needs"):
            merge(config(models), tmp_path / "out", progress=False)
    with monkeypatch.context() as patch:

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space left"):
            merge(config(models), tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*"))
