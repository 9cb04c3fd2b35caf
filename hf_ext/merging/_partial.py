"""The unfinished output: files of their final size beside the final name, and a record of what is done.

    .<name>.merge-partial/
      lock          held while a process works on it
      plan.json     fingerprint of the plan; written when the files below exist
      scans.json    what finished scans have found
      done.txt      blocks that are on the disk, two numbers a line
      scratch/      what a method keeps between passes
      model/        the output; renamed to the final name when it is complete

A block is recorded only after the file that holds it has been synchronized, so a process killed at any
moment, or a machine that loses power, leaves a record that understates what is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..core.files import read_json, write_bytes, write_json
from ._layout import Layout, Slot

_FLUSH_AFTER = 1 << 27  # bytes written between two entries into the record


class Partial:
    """The folder that a merge is written into until it is complete.

    Args:
        out: The final name.
        layout: The files to write.
        fingerprint: Of the plan: parents, settings and layout.
        restart: Whether to discard an unfinished merge of another plan.

    Raises:
        ValueError: An unfinished merge of another plan is there, or another process works on it.
        OSError: The place cannot be written.
    """

    def __init__(self, out: Path, layout: Layout, fingerprint: str, *, restart: bool = False) -> None:
        self.out, self.layout = out, layout
        self.path = partial_path(out)
        self.model, self.scratch = self.path / "model", self.path / "scratch"
        self.done: set[tuple[int, int]] = set()
        self.scans: list[Any] = []
        self._descriptors: list[int] = []
        self._unrecorded: list[tuple[int, int]] = []
        self._touched: set[int] = set()
        self._unflushed = 0
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="hf_ext-flush")
        self._flushing: Future[None] | None = None
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock()
            self.resumed = self._same_plan(fingerprint, restart)
            if self.resumed:
                self._open_files(os.O_RDWR)
                self._read_record()
            else:
                self._start(fingerprint)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"out: another process is merging into {self.out}") from error

    def _same_plan(self, fingerprint: str, restart: bool) -> bool:
        plan = self.path / "plan.json"
        if not plan.is_file() or not self.model.is_dir():  # killed while it was set up, or after its end
            return False
        if read_json(plan).get("fingerprint") == fingerprint:
            return True
        if not restart:
            raise ValueError(
                f"out: {self.path} holds an unfinished merge of another plan (parents or settings have "
                "changed); give restart to discard it, or repeat the merge that it belongs to"
            )
        return False

    def _start(self, fingerprint: str) -> None:
        try:
            self._make(fingerprint)
        except OSError:
            self.discard()  # there is nothing yet to go on with
            raise

    def _make(self, fingerprint: str) -> None:
        for path in self.path.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.model.mkdir()
        self.scratch.mkdir()
        self._open_files(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        for descriptor, file in zip(self._descriptors, self.layout.files, strict=True):
            os.ftruncate(descriptor, file.size)
            _write_all(descriptor, file.header, 0)
            os.fsync(descriptor)
        _sync_folder(self.model)
        write_json(self.path / "plan.json", {"fingerprint": fingerprint})

    def _open_files(self, flags: int) -> None:
        for file in self.layout.files:
            path = self.model / file.name
            self._descriptors.append(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))

    def _read_record(self) -> None:
        weights = {file.name for file in self.layout.files}
        for path in self.model.iterdir():  # side files may have been cut short
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in weights:
                path.unlink()
        record = self.path / "done.txt"
        if record.is_file():
            for line in record.read_text().split("\n")[:-1]:  # what follows the last newline is incomplete
                tensor, _, block = line.partition(" ")
                self.done.add((int(tensor), int(block)))
        if (self.path / "scans.json").is_file():
            self.scans = read_json(self.path / "scans.json")

    # Writing --------------------------------------------------------------------------------------

    def write(self, slot: Slot, start: int, data: memoryview | bytes) -> None:
        """Write bytes of a tensor, from byte `start` of it on; any thread may call this."""
        _write_all(self._descriptors[slot.file], data, slot.offset + start)

    def note(self, tensor: int, numbers: Mapping[str, float]) -> None:
        """Keep numbers on a tensor for the manifest."""
        write_json(self.scratch / f"{tensor}.note.json", dict(numbers))

    def notes(self) -> dict[int, dict[str, float]]:
        """Return what has been noted, by the tensor's number."""
        paths = self.scratch.glob("*.note.json")
        return {int(path.name.partition(".")[0]): read_json(path) for path in paths}

    def record(self, blocks: Iterable[tuple[int, int]], slots: Iterable[Slot], nbytes: int) -> None:
        """Note that blocks have been written; they are recorded once they are on the disk."""
        self._unrecorded += blocks
        self._touched |= {slot.file for slot in slots}
        self._unflushed += nbytes
        if self._unflushed >= _FLUSH_AFTER:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        blocks, files = self._unrecorded, self._touched
        self._unrecorded, self._touched, self._unflushed = [], set(), 0
        self._flushing = self._flusher.submit(self._to_disk, blocks, files)

    def _to_disk(self, blocks: list[tuple[int, int]], files: set[int]) -> None:
        for file in files:
            os.fdatasync(self._descriptors[file])
        record = os.open(self.path / "done.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _write_all(record, "".join(f"{tensor} {block}\n" for tensor, block in blocks).encode(), None)
            os.fdatasync(record)
        finally:
            os.close(record)

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None

    def save_scans(self, states: list[Any]) -> None:
        """Store what the scans so far have found."""
        self.scans = states
        write_json(self.path / "scans.json", states)

    # Ends -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Bring all that has been written to the disk, and into the record."""
        self._flush()
        self._wait()
        for descriptor in self._descriptors:
            os.fsync(descriptor)

    def commit(self, *, overwrite: bool) -> None:
        """Give the complete output its final name; an earlier one is there until then."""
        for path in self.model.rglob("*"):
            if path.is_file():
                _sync(path)
            elif path.is_dir():
                _sync_folder(path)
        _sync_folder(self.model)
        old = self.path / "old"
        if overwrite and self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            self.out.rename(old)
            try:
                self.model.rename(self.out)
            except OSError:
                old.rename(self.out)
                raise
        else:
            self.model.rename(self.out)
        _sync_folder(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Close all files and let go of the lock; what has been recorded stays."""
        self._flusher.shutdown(wait=True)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def partial_path(out: Path) -> Path:
    """Return the folder that an unfinished merge into `out` lies in."""
    return out.parent / f".{out.name}.merge-partial"


def _write_all(descriptor: int, data: memoryview | bytes, place: int | None) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        if place is None:
            done += os.write(descriptor, view[done:])
        else:
            done += os.pwrite(descriptor, view[done:], place + done)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot synchronize a folder
        _sync(path)


def write_files(folder: Path, files: Mapping[str, object]) -> None:
    """Write JSON values, texts and bytes into a folder by name."""
    for name, content in files.items():
        if isinstance(content, bytes):
            write_bytes(folder / name, content)
        elif isinstance(content, str):
            write_bytes(folder / name, content.encode())
        else:
            write_json(folder / name, content)
