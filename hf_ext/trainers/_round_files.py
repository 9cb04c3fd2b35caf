"""Files of a run in rounds: its progress, each round's candidates and pairs, the optimizer's state."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core import dist
from ..core.checks import check
from ..core.files import read_json, write_bytes, write_json
from ..core.state import ROUNDS_FILE
from ._pairs import Pairs


@dataclass
class Progress:
    """What `rounds.json` holds.

    Args:
        round: The round in work, or the last one that is done; -1 before the first.
        done: Whether it is done.
        settings: Settings that a resumed run must share.
        figures: Figures of each round so far, the one in work included.
        logs: Logs of the rounds that are done.
        steps: Optimizer steps of the rounds that are done.
    """

    round: int
    done: bool
    settings: dict[str, Any]
    figures: list[dict[str, float]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def begin(self, number: int) -> Progress:
        """Return the same with a round in work."""
        return replace(self, round=number, done=False)

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read a run's progress.

        Raises:
            ValueError: There is none, or the file is damaged.
        """
        path = folder / ROUNDS_FILE
        try:
            return cls(**read_json(path))
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no rounds to resume ({ROUNDS_FILE} is missing)") from error
        except TypeError as error:
            raise ValueError(f"{path} is not a record of rounds: {error}") from error

    def write(self, folder: Path) -> None:
        """Write it; the other processes wait (a collective)."""
        dist.on_main(lambda: self.write_alone(folder))

    def write_alone(self, folder: Path) -> None:
        """Write it from this process."""
        write_json(folder / ROUNDS_FILE, asdict(self))


def finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of a log with None for each number that JSON has no form of."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is whole: the trainer's state is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a round that is done."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def write_rows(path: Path, rows: Dataset) -> None:
    """Write rows as one parquet file, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            pq.write_table(rows.with_format("arrow")[:], file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def read_rows(path: Path) -> Dataset:
    """Read what `write_rows` wrote, into memory.

    Raises:
        ValueError: The file is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return Dataset(pq.read_table(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def remove_tensors(folder: Path) -> None:
    """Delete the tensors of a round that is no longer needed; its rows stay."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def write_candidates(
    path: Path,
    prompts: Sequence[Any],
    completions: Sequence[Sequence[Any]],
    scores: Tensor,
    pairs: Pairs,
) -> None:
    """Write what was sampled as JSON lines: prompt, completions, scores, and the pair that was made of them.

    Raises:
        OSError: The folder cannot be written.
    """
    lines: list[str] = []
    for row, keep in enumerate(pairs.keep.tolist()):
        values = [None if value != value else value for value in scores[row].tolist()]
        pair = [int(pairs.chosen[row]), int(pairs.rejected[row])] if keep else None
        entry = {"prompt": prompts[row], "completions": completions[row], "scores": values, "pair": pair}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode())


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Return an optimizer's state as flat names and whole tensors (a collective where it is sharded).

    Raises:
        TypeError: Some of it is no tensor.
    """
    found: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"reset_optimizer=False keeps tensors between rounds, and {type(optimizer).__name__} has "
                    f"{name!r} of type {type(value).__name__}; set reset_optimizer=True"
                )
            found[f"{index}/{name}"] = dist.full_tensor(value.detach()).cpu().clone()
    return found


def load_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        ValueError: A parameter is sharded, and some of its state is neither of its shape nor one number.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups = cast(Any, optimizer.state_dict())["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [index for group in groups for index in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        parameter = by_number[int(index)]
        if isinstance(parameter, DTensor) and value.numel() > 1:
            rule = f"of the sharded parameter's shape {tuple(parameter.shape)}; set reset_optimizer=True"
            check(value.shape == parameter.shape, f"optimizer state {name}", tuple(value.shape), rule)
            value = dist.shard_like(value.to(parameter.device), parameter)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
