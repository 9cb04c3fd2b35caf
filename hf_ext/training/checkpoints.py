"""Which checkpoint to resume from: the newest that is whole, or the one named, which then has to be."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from ..core.checks import check
from ..core.files import read_json, tensor_header
from ..core.state import ROUNDS_FILE

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_INDEX = "model.safetensors.index.json"


def checkpoints(output_dir: str | Path, *, in_rounds: bool = False) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; of one in rounds, the rounds' folders."""
    if in_rounds:
        return sorted(path for path in Path(output_dir).glob("round_*") if path.is_dir())
    found = [
        (_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def delete_checkpoints(output_dir: str | Path, *, in_rounds: bool = False) -> None:
    """Delete the checkpoint folders of an earlier run."""
    if in_rounds:
        (Path(output_dir) / ROUNDS_FILE).unlink(missing_ok=True)
    for path in checkpoints(output_dir, in_rounds=in_rounds):
        shutil.rmtree(path)


def find_checkpoint(
    output_dir: str, wanted: bool | str | None, world_size: int
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, and why newer ones were passed over.

    Args:
        output_dir: The run's folder.
        wanted: True for the newest complete one, a folder, or None or False for a fresh start.
        world_size: Number of processes that will resume.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The one named is damaged, or all are; the text names the file.
    """
    if not wanted:
        return None, []
    if isinstance(wanted, str):
        check_checkpoint(Path(wanted), world_size)
        return Path(wanted), []
    skipped: list[str] = []
    for path in reversed(checkpoints(output_dir)):
        try:
            check_checkpoint(path, world_size)
        except (OSError, ValueError) as error:
            skipped.append(str(error))
        else:
            return path, skipped
    if skipped:
        raise ValueError(
            f"resume_from_checkpoint: every checkpoint in {output_dir} is damaged: {'; '.join(skipped)}"
        )
    raise FileNotFoundError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}")


def check_checkpoint(folder: Path, world_size: int) -> None:
    """Refuse a checkpoint that lacks a file, or holds a truncated one.

    A process killed while it saves leaves such a folder. The trainer's state is written last.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is truncated or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {folder}")
    state = read_json(_present(folder / "trainer_state.json"))
    check(isinstance(state, dict) and "global_step" in state, "global_step", None, "given", where=str(folder))
    # Sharded engines keep weights and optimizer in folders of their own form, with checks of their own.
    if (
        any(folder.glob("global_step*"))
        or any(folder.glob("pytorch_model_fsdp_*"))
        or any(folder.glob("optimizer_*"))
    ):
        return
    for path in _weights(folder):
        tensor_header(_present(path))
    own = [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *own):
        _check_archive(_present(folder / name))


def _weights(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map", {}).values()
        return [folder / shard for shard in sorted(set(shards))]
    return [next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder / _WEIGHTS[0])]


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
    return path


def _check_archive(path: Path) -> None:
    # torch.save writes a zip archive with checksums; this reads it without unpickling anything.
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged (entry {broken})")
