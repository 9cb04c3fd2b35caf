"""What a sequential merge carries on: the sum of the changes so far, tensor by tensor, with its scalars.

    state.json        format, scalars, and the SHA-256 of each tensor of the base as fp32
    sum.safetensors   the sums, fp32, by the names of the model's tensors

Tensors are copied and read one at a time, so that the memory is that of the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.checks import check
from ..core.files import read_json, tensor_header, write_json
from ._base import TensorInfo
from ._layout import plan_layout
from ._scratch import get

_FORMAT = 1
_STATE, _SUM = "state.json", "sum.safetensors"


@dataclass(frozen=True)
class RunningSum:
    """An earlier sum.

    Args:
        folder: Where it lies.
        norms: Norm of each model's task vector.
        models: Names of the models.
        bases: SHA-256 of each tensor of the base; None in product space, which has no base.
        shapes: Shape of each tensor.
    """

    folder: Path
    norms: list[float]
    models: list[str]
    bases: Mapping[str, str | None]
    shapes: Mapping[str, tuple[int, ...]]

    def check_tensors(self, tensors: Sequence[TensorInfo]) -> None:
        """Refuse models that do not have the tensors of the sum."""
        given = {tensor.name: tensor.shape for tensor in tensors}
        differing = sorted(
            name for name in {*given, *self.shapes} if given.get(name) != self.shapes.get(name)
        )
        rule = "an earlier merge of models with the same tensors"
        check(not differing, "continue_from", str(self.folder.parent), rule, where=", ".join(differing[:5]))

    def read(self, name: str, base: str | None) -> Tensor:
        """Return one tensor of the sum, after a look at the base that it belongs to.

        Raises:
            ValueError: The base differs from that of the sum; the text names the tensor.
        """
        rule = "an earlier merge onto the same base"
        check(self.bases[name] == base, "continue_from", str(self.folder.parent), rule, where=name)
        with safe_open(self.folder / _SUM, framework="pt", device="cpu") as file:
            return file.get_tensor(name).clone()


def read_running_sum(folder: Path, field: str) -> RunningSum:
    """Return an earlier sum; its tensors are not read yet.

    Args:
        folder: What `write_running_sum` has written.
        field: Name of the setting that says where, for the error text.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    whole = (folder / _STATE).is_file() and (folder / _SUM).is_file()
    check(whole, field, str(folder.parent), f"an earlier merge with keep_state (with {folder.name}/{_SUM})")
    content = cast("dict[str, Any]", read_json(folder / _STATE))
    version = content.get("format")
    check(version == _FORMAT, "format", version, str(_FORMAT), where=str(folder / _STATE))
    header = tensor_header(folder / _SUM)
    shapes = {name: tuple(fields["shape"]) for name, fields in header.items()}
    same = sorted(shapes) == sorted(content["bases"]) and all(f["dtype"] == "F32" for f in header.values())
    check(same, _SUM, sorted(shapes)[:3], f"the tensors of {_STATE}, in fp32", where=str(folder))
    return RunningSum(folder, content["norms"], content["models"], content["bases"], shapes)


def write_running_sum(
    folder: Path, kept: Mapping[str, Path], scalars: Mapping[str, object], bases: Mapping[str, str | None]
) -> None:
    """Write a sum into a folder that becomes visible as a whole later.

    Args:
        folder: Where; made if it is not there.
        kept: For each tensor the file of `_scratch` that holds it.
        scalars: What else to store.
        bases: SHA-256 of each tensor of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(get(path).shape) for name, path in kept.items()}
    layout = plan_layout([(name, "F32", shape) for name, shape in shapes.items()], 1 << 62, "sum")
    (file,) = layout.files
    with (folder / file.name).open("wb") as out:
        out.write(file.header)
        for name, slot in sorted(layout.slots.items(), key=lambda item: item[1].offset):
            out.seek(slot.offset)
            values = get(kept[name])
            if values.numel():
                out.write(values.reshape(-1).view(torch.uint8).numpy().data)
        out.truncate(file.size)
    write_json(folder / _STATE, {"format": _FORMAT, "bases": dict(bases), **scalars})
