"""Kills a merge at each of its system calls in turn, and goes on with it; run by test_partial.py.

Torch is loaded once; every merge is a forked child that counts the calls which change the disk and ends
itself by SIGKILL before a given one. Printed is a JSON list of what was wrong, and how many moments were
tried.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ext.merging import merge
from hf_ext.merging._checkpoint import file_digest

CALLS = ("pwrite", "write", "fsync", "fdatasync", "ftruncate", "rename", "replace", "mkdir")


def main() -> None:
    config, work, stride = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    out = work / "out"
    calls = child(lambda: merge(config, out, progress=False, overwrite=True), None)
    whole = digests(out)
    wrong: list[str] = []
    # A finished merge that is to be replaced lies there in every second round.
    for moment in range(1, calls + 1, stride):
        if moment // stride % 2:
            shutil.rmtree(out, ignore_errors=True)
        before = digests(out) if out.exists() else None
        child(lambda: merge(config, out, progress=False, overwrite=True), moment)
        if out.exists() and digests(out) != whole:
            wrong.append(f"killed at {moment}: the final name holds something incomplete")
        if before is not None and not out.exists() and not list(work.glob(".out.merge-partial/old")):
            wrong.append(f"killed at {moment}: the earlier output is lost")
        child(lambda: merge(config, out, progress=False, overwrite=True), None)
        if digests(out) != whole:
            wrong.append(f"killed at {moment}: what was gone on with differs")
        if list(work.glob(".out*")):
            wrong.append(f"killed at {moment}: something is left behind")
    print(json.dumps({"moments": len(range(1, calls + 1, stride)), "calls": calls, "wrong": wrong}))


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of a complete output, or nothing where its manifest does not hold."""
    if not (folder / "merge_manifest.json").is_file():
        return {}
    found = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    listed = json.loads((folder / "merge_manifest.json").read_text())["output"]
    return found if all(found.get(name) == digest for name, digest in listed.items()) else {}


def child(work: Callable[[], object], moment: int | None) -> int:
    """Run in a fork, killed before the given call; return the number of calls of one that was not killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        counter = {"calls": 0}
        for name in CALLS:
            setattr(os, name, counting(getattr(os, name), counter, moment))
        status = 1
        try:
            work()
            status = 0
        finally:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(str(counter["calls"]))
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if moment is None and status:
        raise SystemExit(f"a merge that was not killed failed: {status}")
    return int(text or 0)


def counting(call: Callable[..., Any], counter: dict[str, int], moment: int | None) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        counter["calls"] += 1
        if counter["calls"] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return counted


if __name__ == "__main__":
    main()
