"""One merge from its config to the finished folder: plan, stream, hash, commit."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..core.checks import check
from ._checkpoint import Checkpoint, file_digest
from ._config import MergeConfig, read_config
from ._engine import Engine, available_threads
from ._layout import INDEX
from ._manifest import card, manifest
from ._parents import open_parents
from ._partial import Partial, write_files
from ._plan import Plan, make_plan
from ._reductions import CHUNK
from ._side_files import copy_side_files, dtype_of, side_files

MANIFEST = "merge_manifest.json"
_SPARE = 64 << 20  # bytes that shall stay free beside the output


@dataclass(frozen=True)
class MergeResult:
    """What a merge has written.

    Args:
        path: The folder.
        manifest: Content of its merge_manifest.json.
        resumed: Whether an interrupted merge was gone on with.
    """

    path: Path
    manifest: Mapping[str, Any]
    resumed: bool


def merge(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Merge models or adapters into a folder that `from_pretrained` loads.

    Names, shapes, types, vocabularies and settings are checked before anything is written. A call that was
    interrupted, even by SIGKILL, is gone on with by the same call; the final name exists only when all is
    there. Bytes of the result depend on parents and settings alone, not on threads or blocks.

    Args:
        config: A `MergeConfig`, a mapping of its fields, or the path of a YAML file, mergekit's included.
        out: The folder to write.
        overwrite: Whether an earlier merge there may be replaced; it stays until the new one is whole.
        restart: Whether an unfinished merge of another plan may be discarded.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        FileNotFoundError: A model, or the file of the config, is not there.
        ValueError: Models or settings are refused, with all reasons; or a result is not finite.
        TypeError: A setting does not have its field's type.
        OSError: The output cannot be written.
    """
    settings = _config(config)
    out = Path(os.path.abspath(out))
    _check_out(out, (), overwrite)  # what a method prepares may take hours
    settings = settings.method().prepare(settings, out)
    method = settings.method()
    parents = open_parents(settings, method)
    try:
        _check_out(out, parents.all(), overwrite)
        plan = make_plan(settings, method, parents)
        side_files(parents.side)
        out.parent.mkdir(parents=True, exist_ok=True)
        return _write(plan, out, overwrite=overwrite, restart=restart, progress=progress)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.strerror == os.strerror(errno.ENOSPC):
            text = f"no space left for {out}; what was written of it has been removed"
            raise OSError(errno.ENOSPC, text) from error
        raise
    finally:
        parents.close()


def _config(config: MergeConfig | Mapping[str, Any] | str | Path) -> MergeConfig:
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return MergeConfig.from_mapping(config, "config")
    return read_config(config)


def _check_out(out: Path, parents: Iterable[Checkpoint], overwrite: bool) -> None:
    place = out.resolve()
    for parent in parents:
        source = parent.folder.resolve()
        clear = not source.is_relative_to(place) and not place.is_relative_to(source)
        check(clear, "out", str(out), "a folder apart from the models'", where=parent.label)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    check(overwrite, "out", str(out), "a new folder; give overwrite to replace an earlier merge")
    earlier = (out / MANIFEST).is_file()
    check(earlier, "out", str(out), f"an earlier merge (with {MANIFEST}) to be overwritten")


def _check_space(plan: Plan, partial: Path, out: Path) -> None:
    here = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(out.parent).free + here
    need = plan.layout.nbytes + _SPARE
    if free < need:
        raise OSError(
            errno.ENOSPC, f"{out.parent} has {free >> 20} MiB free, and the merge needs {need >> 20} MiB"
        )


def _write(plan: Plan, out: Path, *, overwrite: bool, restart: bool, progress: bool) -> MergeResult:
    from ._partial import partial_path

    _check_space(plan, partial_path(out), out)
    store = Partial(out, plan.layout, plan.fingerprint(), restart=restart)
    threads = plan.config.threads or available_threads()
    hashing = ThreadPoolExecutor(1, thread_name_prefix="hf_ext-hash")
    try:
        digests = {
            id(model): {path.name: hashing.submit(model.digest, path) for path in model.files}
            for model in plan.parents.all()
        }
        engine = _stream(plan, store, threads, progress)
        store.finish()
        found = {
            model: {name: future.result() for name, future in files.items()}
            for model, files in digests.items()
        }
        content = _finish(plan, store, engine, found, threads)
        store.commit(overwrite=overwrite)
    except (ValueError, MemoryError):
        store.discard()  # the same merge would fail again
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            store.discard()
        raise
    finally:
        hashing.shutdown(wait=True, cancel_futures=True)
        store.close()
    return MergeResult(out, content, store.resumed)


def _stream(plan: Plan, store: Partial, threads: int, progress: bool) -> Engine:
    block = None if plan.whole else plan.config.block_bytes // 4 // CHUNK * CHUNK
    with tqdm(
        total=plan.work(),
        unit="elements",
        unit_scale=True,
        desc=f"merge ({plan.method.info.name})",
        disable=None if progress else True,
    ) as bar:
        engine = Engine(
            plan.method,
            plan.tasks,
            store,
            threads=threads,
            block=block,
            seed=plan.config.seed,
            advance=bar.update,
        )
        engine.run()
    return engine


def _notes(plan: Plan, store: Partial) -> dict[str, object]:
    found = store.notes()
    names = {task.info.index: task.info.name for task in plan.tasks}
    return {"by_tensor": {names[index]: found[index] for index in sorted(found)}} if found else {}


def _finish(
    plan: Plan, store: Partial, engine: Engine, digests: Mapping[int, Mapping[str, str]], threads: int
) -> dict[str, Any]:
    """Write all but the weights, and return the manifest."""
    folder = store.model
    kind = dtype_of(task.slot.dtype for task in plan.tasks if task.slot is not None)
    copy_side_files(plan.parents.side, folder, kind, plan.model_config)
    index = plan.layout.index()
    files = {**(plan.files or {}), **({INDEX: index} if index is not None else {})}
    write_files(folder, {**files, **plan.method.extra_files(engine.states)})
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, "README.md")
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="hf_ext-hash") as pool:
        output = dict(
            zip((str(path.relative_to(folder)) for path in paths), pool.map(file_digest, paths), strict=True)
        )
    content = manifest(plan, digests, output, _notes(plan, store))
    write_files(folder, {MANIFEST: content, "README.md": card(plan, content)})
    return content
